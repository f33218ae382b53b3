"""The training application: GPT-2 on real text, then its tier_hints.json.

``python -m gpt2.train`` reads ``.config``. data.py turns documents (``lib.text.sources``) into
token shards, model.py builds the network, distributed.py knows about ranks, checkpoint.py and
rundir.py own the files of a run, hints.py writes the hints.
"""
