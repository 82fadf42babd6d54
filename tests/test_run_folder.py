"""What the folder of a run tells."""

import pytest

from quanttune.jobs.run_folder import RunFolder


def test_damaged_metrics_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.last() == {}
    folder.append({"loss": 1.0})
    folder.append({"loss": 0.5})
    assert folder.last() == {"loss": 0.5}
    folder.metrics.write_text('{"loss": 1.0}\n{"lo')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        folder.last()
