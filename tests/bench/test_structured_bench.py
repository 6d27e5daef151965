"""Speed of structured layers."""

from basis.bench.cases import bench_layers


def test_what_a_shape_cannot_take_is_a_row_with_the_reason(setting):
    report = bench_layers("structured", candidates=["generic:0.01", "sep"], shapes=["16@6", "128@4"], setting=setting)
    assert [(row["shape"], row["layer"]) for row in report.rows if "error" in row] == [("16@6", "generic:0.01")]
    row = report.rows[1]
    assert "rank 0 with 16 -> 16 channels" in row["error"]
    assert "ms" not in row
    assert "generic:0.01 layer failed: " in str(report)
    assert len(report.rows) == 2 * (1 + 2)
