"""Exact output: the full model's text, whatever drafts it."""

import inspect
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import StoppingCriteriaList

from lib.errors import InputError, PlacementError
from lib.progressive.attach import attach
from lib.progressive.exact import ExactRuntime
from lib.progressive.windows import Windows

IDS = torch.arange(1, 9).view(1, -1)
PADDED = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 9, 10, 11, 12], [0, 0, 0, 0, 0, 13]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 39,
}
LETTERS = string.ascii_letters[:40]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
MIXED: dict[str, Any] = {
    **SMALL,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
    "mistral": lambda: build("MistralForCausalLM", {**SMALL, "sliding_window": 6}),
    "qwen2": lambda: build("Qwen2ForCausalLM", SMALL),
    "qwen2 sliding": lambda: build(
        "Qwen2ForCausalLM",
        {
            **SMALL,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": lambda: build("Qwen3ForCausalLM", {**SMALL, "head_dim": 8}),
    "phi3": lambda: build("Phi3ForCausalLM", {**SMALL, "sliding_window": 6}),
    "gemma": lambda: build("GemmaForCausalLM", {**SMALL, "head_dim": 8}),
    "gemma2": lambda: build("Gemma2ForCausalLM", MIXED),
    "gemma3": lambda: build("Gemma3ForCausalLM", MIXED),
    "gemma3n": lambda: build(
        "Gemma3nForCausalLM",
        {
            **MIXED,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 40,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gpt_oss": lambda: build("GptOssForCausalLM", {**MIXED, "num_local_experts": 4}),
    "olmo2": lambda: build("Olmo2ForCausalLM", SMALL),
    "cohere": lambda: build("CohereForCausalLM", SMALL),
    "granite": lambda: build("GraniteForCausalLM", SMALL),
    "stablelm": lambda: build("StableLmForCausalLM", SMALL),
    "neox": lambda: build("GPTNeoXForCausalLM", SMALL),
    "gptj": lambda: build(
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 40},
    ),
    "opt": lambda: build(
        "OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
    ),
    "phi": lambda: build("PhiForCausalLM", SMALL),
    "bigcode": lambda: build(
        "GPTBigCodeForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 64},
    ),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt_neo": (
        lambda: build(
            "GPTNeoForCausalLM",
            {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "vocab_size": 40,
                "attention_types": [[["global", "local"], 1]],
            },
        ),
        "GPTNeoForCausalLM",
    ),
    "falcon alibi": (
        lambda: build("FalconForCausalLM", {**SMALL, "alibi": True, "num_kv_heads": 2}),
        "ALiBi",
    ),
    "bloom": (
        lambda: build(
            "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40}
        ),
        "BloomForCausalLM",
    ),
    "mamba": (
        lambda: build(
            "MambaForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4},
        ),
        "MambaForCausalLM",
    ),
    "t5": (
        lambda: build(
            "T5ForConditionalGeneration",
            {"vocab_size": 40, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2},
        ),
        "encoder-decoder",
    ),
    "bert": (
        lambda: build(
            "BertModel",
            {key: SMALL[key] for key in SMALL if key != "num_key_value_heads"},
        ),
        "BertModel",
    ),
}


def build(name: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config))


def perturb(model: Any) -> Any:
    """Return it with weights large enough that texts differ and scores don't tie, and no end."""
    torch.manual_seed(1)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@contextmanager
def exact(
    model: Any, folder: Path, *, precision: str = "int8", **kwargs: Any
) -> Iterator[ExactRuntime]:
    """Attach with a draft; the full weights stream in what is left of a small budget."""
    budget = {"HBM": 400_000, "SSD": None}
    kwargs = {"exact": True, "budget": budget, "spill_dir": folder, **kwargs}
    with attach(model, precision=precision, **kwargs) as runtime:
        assert isinstance(runtime, ExactRuntime)
        yield runtime


def greedy(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": 20, "do_sample": False, **kwargs})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_it_says_by_itself(name: str, tmp_path: Path) -> None:
    model = perturb(FAMILIES[name]())
    plain, batch = greedy(model), greedy(model, PADDED, attention_mask=MASK)
    for precision in ("int8", "int2"):
        with exact(model, tmp_path, precision=precision) as runtime:
            assert torch.equal(greedy(model), plain)
            assert torch.equal(greedy(model, PADDED, attention_mask=MASK), batch)
            assert runtime.stats().drafting.windows > 0
    assert torch.equal(greedy(model), plain)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drafted_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, what = REFUSED[name]
    model = make().eval()
    with pytest.raises(InputError, match=what):
        attach(model, budget={"HBM": 400_000, "SSD": None}, exact=True)


def test_samples_are_the_same_whatever_the_draft(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    texts = []
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.95}
    for precision in ("int8", "int4", "int2"):
        with exact(model, tmp_path, precision=precision):
            torch.manual_seed(3)
            texts.append(
                (greedy(model, **settings), greedy(model, PADDED, attention_mask=MASK, **settings))
            )
            torch.manual_seed(4)
            other = greedy(model, **settings)
    for one, batch in texts[1:]:
        assert torch.equal(one, texts[0][0]) and torch.equal(batch, texts[0][1])
    assert not torch.equal(other, texts[0][0])


def test_a_random_draft_costs_time_alone(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    plain = greedy(model)
    with exact(model, tmp_path) as runtime:
        generator = torch.Generator().manual_seed(0)
        passes = runtime.draft.model.forward

        def noise(**kwargs: Any) -> Any:
            output = passes(**kwargs)
            output.logits = torch.randn(output.logits.shape, generator=generator)
            return output

        runtime.draft.model.forward = noise
        assert torch.equal(greedy(model), plain)
        assert runtime.stats().drafting.accepted < runtime.stats().drafting.drafted
        runtime.draft.model.forward = passes


def test_processors_stops_and_scores_are_generate_s(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    common: dict[str, Any] = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    dicts: dict[str, Any] = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain = greedy(model, **common, **dicts)
    ends = int(plain.sequences[0, 14])
    stopped = greedy(model, eos_token_id=ends, pad_token_id=0)
    padded: dict[str, Any] = {"ids": PADDED, "attention_mask": MASK, "pad_token_id": 0}
    batch = greedy(model, **padded, eos_token_id=ends)
    unlike = greedy(model, **padded, **common)
    long = greedy(model, max_new_tokens=None, max_length=11)

    def after_twelve(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 12)

    criteria: Any = StoppingCriteriaList([after_twelve])
    short = greedy(model, stopping_criteria=criteria)
    with exact(model, tmp_path, precision="int4"):
        got = greedy(model, **common, **dicts)
        assert torch.equal(got.sequences, plain.sequences)
        for name in ("scores", "logits"):
            ours, theirs = getattr(got, name), getattr(plain, name)
            assert len(ours) == len(theirs) == 20
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)
        assert torch.equal(greedy(model, eos_token_id=ends, pad_token_id=0), stopped)
        assert torch.equal(greedy(model, **padded, eos_token_id=ends), batch)
        assert torch.equal(greedy(model, **padded, **common), unlike)
        assert torch.equal(greedy(model, max_new_tokens=None, max_length=11), long)
        two = greedy(model, IDS, num_return_sequences=2, do_sample=True)
        assert len(two) == 2 and not torch.equal(two[0], two[1])
        assert torch.equal(greedy(model, stopping_criteria=criteria), short)


class Streamer:
    """Keeps what it is given; fails at the token of a number."""

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = ValueError):
        self.tokens: list[int] = []
        self.ended = False
        self._fails_at, self._error = fails_at, error

    def put(self, ids: Tensor) -> None:
        self.tokens += ids.flatten().tolist()
        if self._fails_at is not None and len(self.tokens) == IDS.shape[1] + self._fails_at:
            raise self._error("of the streamer")

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_streamer_hears_each_token_and_may_fail(
    error: type[BaseException], tmp_path: Path
) -> None:
    model = perturb(tiny_llama())
    plain = greedy(model)
    with exact(model, tmp_path):
        streamer = Streamer()
        greedy(model, streamer=streamer)
        assert streamer.tokens == plain[0].tolist() and streamer.ended
        for number in (1, 2, 7):
            failing = Streamer(number, error)
            with pytest.raises(error, match="of the streamer"):
                greedy(model, streamer=failing)
            assert failing.tokens == plain[0, : IDS.shape[1] + number].tolist()
            assert torch.equal(greedy(model), plain)


def test_strict_computes_near_ties_as_generate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturb(tiny_llama())
    plain = greedy(model)
    with exact(model, tmp_path, exact="strict") as runtime:
        assert 0 < runtime.tolerance < 1e-2
        assert torch.equal(greedy(model), plain)
        monkeypatch.setattr(ExactRuntime, "tolerance", 1e9)  # everything ties
        assert torch.equal(greedy(model), plain)
        assert runtime.stats().drafting.redone == 20
        with pytest.raises(InputError, match="one sequence"):
            greedy(model, PADDED, attention_mask=MASK)


@pytest.mark.parametrize("name", ["cohere", "gpt2", "olmo2", "qwen3"])
def test_strict_knows_how_bf16_rounds(name: str, tmp_path: Path) -> None:
    model = perturb(FAMILIES[name]()).to(torch.bfloat16)
    plain = greedy(model)
    with exact(model, tmp_path, exact="strict") as runtime:
        assert runtime.tolerance > 0
        assert torch.equal(greedy(model), plain)


def test_strict_refuses_routers_that_round(tmp_path: Path) -> None:
    model = perturb(tiny_mixtral()).to(torch.bfloat16)
    budget = {"HBM": 400_000, "SSD": None}
    with pytest.raises(InputError, match="experts of a MixtralForCausalLM in bfloat16"):
        attach(model, budget=budget, exact="strict")
    with exact(model, tmp_path):
        assert greedy(model).shape == (1, 28)


def test_the_budget_holds_both(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    for limit in (200_000, 260_000, 400_000):
        with exact(model, tmp_path, budget={"HBM": limit, "SSD": None}) as runtime:
            greedy(model)
            assert runtime.stats().peak_resident_bytes <= limit == runtime.budget["HBM"]


def test_what_has_another_way_to_decode_is_refused(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    with exact(model, tmp_path):
        for kwargs in (
            {"num_beams": 2},
            {"assistant_model": tiny_llama().eval()},
            {"output_attentions": True, "return_dict_in_generate": True},
        ):
            with pytest.raises(InputError):
                greedy(model, **kwargs)
        with pytest.raises(InputError, match="padded on the left"):
            greedy(model, PADDED.flip(1), attention_mask=MASK.flip(1))
        assert torch.equal(greedy(model), greedy(model))


def test_arguments_without_an_exact_output_are_refused(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    embeds = torch.randn(1, 4, 32)
    with exact(model, tmp_path):
        for kwargs in (
            {"inputs_embeds": embeds},
            {"past_key_values": transformers.DynamicCache()},
            {"position_ids": torch.arange(8)[None]},
            {"guidance_scale": 2.0},
            {"custom_generate": "somewhere/else"},
        ):
            with pytest.raises(InputError, match=next(iter(kwargs))):
                greedy(model, **kwargs)
        for kwargs in ({"streamer": Streamer()}, {"prefix_allowed_tokens_fn": lambda *_: [1]}):
            with pytest.raises(InputError, match="of a batch"):
                greedy(model, PADDED, attention_mask=MASK, **kwargs)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast"):
            greedy(model)
        assert greedy(model, custom_generate=None).shape == (1, 28)
        with pytest.raises(InputError, match="draft alone"):
            model_budget(model, 20_000)


def model_budget(model: Any, limit: int) -> None:
    """Set the budget of the runtime that a model's generate belongs to."""
    closure = inspect.getclosurevars(vars(model)["generate"]).nonlocals
    closure["self"].budget = {"HBM": limit, "SSD": None}


@pytest.mark.parametrize("length", [32, 33])
@pytest.mark.parametrize("precision", ["int8", "int2"])
def test_texts_go_to_the_end_of_the_context(precision: str, length: int, tmp_path: Path) -> None:
    model = perturb(
        tiny_gpt2()
    )  # of 32 positions, each with an embedding of its own; a last token needs none
    ids = torch.randint(1, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    one, batch = (
        greedy(model, given, max_new_tokens=None, max_length=length) for given in (ids[:1], ids)
    )
    with exact(model, tmp_path, precision=precision):
        assert torch.equal(greedy(model, ids[:1], max_new_tokens=None, max_length=length), one)
        assert torch.equal(greedy(model, ids, max_new_tokens=None, max_length=length), batch)


def test_a_text_may_end_before_a_context_that_its_length_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Windows, "choose", lambda _: 31)
    model = perturb(tiny_gpt2())
    plain = greedy(model)
    ends: dict[str, Any] = {"eos_token_id": int(plain[0, 20]), "pad_token_id": 0}
    stopped = greedy(model, max_new_tokens=80, **ends)
    with exact(model, tmp_path):
        assert torch.equal(greedy(model, max_new_tokens=80, **ends), stopped)
        with pytest.raises(IndexError):  # as plain generate
            greedy(model, max_new_tokens=80)
        assert torch.equal(greedy(model), plain)


def test_a_draft_that_needs_more_room_than_was_planned_keeps_to_its_own(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
    config = {**SMALL, "head_dim": 8, "attention_chunk_size": 8, **experts}
    model = perturb(build("Llama4ForCausalLM", config))  # experts that compute all at once
    plain = greedy(model)
    with pytest.raises(InputError) as refusal:
        exact(model, tmp_path, budget={"HBM": 60_000, "SSD": None}).__enter__()
    least = int(str(refusal.value).rpartition("=")[2])
    with exact(model, tmp_path, budget={"HBM": least, "SSD": None}) as runtime:
        assert torch.equal(greedy(model), plain)
        assert runtime.stats().peak_resident_bytes <= least == runtime.budget["HBM"]


def test_rotary_embeddings_that_change_on_the_way_are_refused(tmp_path: Path) -> None:
    config = {**SMALL, "max_position_embeddings": 16, "rope_parameters": DYNAMIC}
    model = perturb(build("LlamaForCausalLM", config))
    plain = greedy(model, max_new_tokens=8)
    with exact(model, tmp_path):
        assert torch.equal(greedy(model, max_new_tokens=8), plain)
        with pytest.raises(InputError, match="beyond 16"):
            greedy(model, max_new_tokens=9)


class Counts(transformers.LogitsProcessor):
    """Forbids a token that depends on how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores[:, self.calls % 40] = -torch.inf
        return scores


def test_a_users_processor_sees_each_token_once(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    processors = transformers.LogitsProcessorList
    plain = greedy(model, logits_processor=processors([Counts()]))
    with exact(model, tmp_path):
        ours = Counts()
        assert torch.equal(greedy(model, logits_processor=processors([ours])), plain)
        assert ours.calls == 20


def test_stop_strings_of_arguments_and_of_settings(tmp_path: Path) -> None:
    model, tokenizer = perturb(tiny_llama()), letters()
    plain = greedy(model)
    words = tokenizer.decode(plain[0, 14:16])
    stopped = greedy(model, stop_strings=[words], tokenizer=tokenizer)
    assert stopped.shape[1] < plain.shape[1]
    with exact(model, tmp_path):
        assert torch.equal(greedy(model, stop_strings=[words], tokenizer=tokenizer), stopped)
        with pytest.raises(InputError, match="need the tokenizer"):
            greedy(model, stop_strings=[words])
        model.generation_config.stop_strings = [words]
        assert torch.equal(greedy(model, tokenizer=tokenizer), stopped)
        settings = transformers.GenerationConfig(max_new_tokens=20, do_sample=False)
        assert torch.equal(model.generate(IDS, settings, tokenizer=tokenizer), stopped)
    model.generation_config.stop_strings = None


def letters() -> Any:
    """A tokenizer of 40 letters."""
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, "a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def test_settings_that_exclude_each_other_are_refused() -> None:
    model = tiny_llama().eval()
    budget = {"HBM": 400_000, "SSD": None}
    with pytest.raises(InputError, match="give one"):
        attach(model, exact=True)
    with pytest.raises(InputError, match="names CPU, SSD and no HBM"):
        attach(model, budget={"CPU": "1GiB", "SSD": None}, exact=True)
    with pytest.raises(InputError, match="allowed: False, True, 'strict'"):
        attach(model, budget=budget, exact="very")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no effect"):
        attach(model, budget=budget, exact=True, measure=lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match="the smallest that works is HBM=") as refusal:
        attach(model, budget={"HBM": 60_000, "SSD": None}, exact=True)
    least = int(str(refusal.value).rpartition("=")[2])
    with attach(model, budget={"HBM": least, "SSD": None}, exact=True) as runtime:
        assert runtime.budget["HBM"] == least
    with attach(model, budget=budget) as runtime:
        assert not isinstance(runtime, ExactRuntime)


def test_nothing_is_left_after_detach(tmp_path: Path) -> None:
    model = perturb(tiny_llama())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with exact(model, tmp_path) as runtime:
        draft = runtime.draft
        greedy(model)
    assert "generate" not in vars(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(PlacementError):
        next(draft.model.parameters()).sum()
    runtime.detach()
