"""Recordings of routing: read back as written, read as others write them, nonsense by its line."""

import gzip
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.evaluation.route_traces import make_trace, read_trace, write_trace
from lib.policy.experts.routing import Cell

HEADER = """# route_trace v1
# model=toy arch=toy n_layer=4 n_expert=8 n_expert_used=2
# layer=1 expert_bytes=300 dense_bytes=7
# layer=3 expert_bytes=200 dense_bytes=7
"""
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
ROWS = """0,0,0,1,0,5,0.75,0,300
0,0,0,1,1,2,0.25,0,300
0,1,1,1,0,5,nan,1,0
0,1,1,3,0,0,0.5,0,200
"""


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_what_is_written_is_read_back_and_the_file_is_always_the_same(
    tmp_path: Path, name: str
) -> None:
    trace = make_trace(
        [
            Cell(0, False, 0, 1, (5, 2), (0.75, 0.25)),
            Cell(0, True, 1, 1, (5, 1)),
            Cell(0, True, 1, 3, (0,), (0.5,)),
            Cell(1, True, 0, 3, (7,), (1.0,)),
        ],
        model="a toy",
        experts={0: 8, 1: 8, 3: 8},
        expert_bytes={1: 300, 3: 200},
    )
    assert trace.per_token == {1: 2, 3: 1} and trace.num_experts == 16
    path = tmp_path / name
    write_trace(trace, path)
    first = path.read_bytes()
    read = read_trace(path)
    assert read.model == "a_toy"
    assert (read.cells, read.experts, read.per_token, read.expert_bytes) == (
        trace.cells,
        trace.experts,
        trace.per_token,
        trace.expert_bytes,
    )
    write_trace(trace, path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "text",
    [
        HEADER + COLUMNS + ROWS,
        "\ufeff" + (HEADER + COLUMNS + ROWS).replace("\n", "\r\n") + "\r\n",
        HEADER
        + "expert,layer,phase,step,dropped,turn,slot\n5,1,0,0,0,0,0\n2,1,0,0,0,0,1\n"
        + "5,1,1,1,0,0,0\n0,3,1,1,1,0,0\n",
    ],
    ids=["theirs", "crlf", "other columns"],
)
def test_what_others_write_is_read(tmp_path: Path, text: str) -> None:
    trace = read_trace(write(tmp_path, text))
    assert [(cell.layer, cell.decode, cell.experts) for cell in trace.cells] == [
        (1, False, (5, 2)),
        (1, True, (5,)),
        (3, True, (0,)),
    ]
    assert trace.expert_bytes == {1: 300, 3: 200} and trace.experts == {1: 8, 3: 8}
    assert trace.cells[1].weights is None


def test_without_a_header_sizes_and_counts_come_from_the_rows(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "step,layer,expert\n0,0,3\n0,0,1\n1,0,2\n"))
    assert trace.experts == {0: 4} and trace.per_token == {0: 2} and trace.expert_bytes == {0: 1}
    assert all(cell.decode for cell in trace.cells)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (HEADER + COLUMNS + ROWS + "0,1,2,1,0,x,0,0,0\n", "line 10: expert 'x'"),
        (HEADER + COLUMNS + ROWS + "0,1,2,1,0,-1,0,0,0\n", "line 10: expert '-1'"),
        (HEADER + COLUMNS + ROWS + "0,1,2,1,0,8,0,0,0\n", "line 10: expert 8 of 8: give 0 to 7"),
        (HEADER + COLUMNS + ROWS + "0,1,2,4,0,1,0,0,0\n", "line 10: layer 4 of 4"),
        (HEADER + COLUMNS + ROWS + "0,2,2,1,0,1,0,0,0\n", "line 10: phase 2"),
        (HEADER + COLUMNS + ROWS + "0,1,1,1,1,5,0,0,0\n", "line 10: .* a second one of step 1"),
        (HEADER + COLUMNS + ROWS + "0,0,0,1,2,7,0,0,0\n", "line 10: more than the 2 experts"),
        (HEADER + COLUMNS + ROWS + "0,1,2,1,0\n", "line 10: 5 fields, and there are 9"),
        (HEADER + ROWS, "line 5: no line of column names"),
        ("step,expert\n", "line 1: no column layer"),
        ("step,layer,expert,step\n", "line 1: column 'step' appears twice"),
        ("# route_trace v2\n", "line 1: route_trace v2 is not known"),
        ("# model=x n_expert=many\n", "line 1: n_expert 'many'"),
        (HEADER + COLUMNS + "0,0,0,1,0,5,0.75,0,300\n", "has no decode step"),
        ("", "has no decode step"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_nonsense_is_refused_with_its_line(tmp_path: Path, text: str | bytes, named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_trace(write(tmp_path, text))


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + COLUMNS + ROWS * 1).encode())
    for data in (whole[:-20], b"step,layer,expert\n"):
        with pytest.raises(InputError, match="not a whole gzip file"):
            read_trace(write(tmp_path, data, "t.csv.gz"))
    with pytest.raises(InputError, match="can't be read"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(InputError, match="can't be read"):
        read_trace(tmp_path)
