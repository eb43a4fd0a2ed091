"""The chart of a claim shows its arms, whichever have figures, and refuses a result without any."""

import pytest
from PIL import Image

from seriatim.evaluation.claim_chart import save_claim

RESULT = {
    "key": "hydra", "metric": "tokens_per_forward", "verdict": "holds", "ours": 1.65,
    "arms": {
        "medusa": [{"tokens_per_forward": 1.5}, {"tokens_per_forward": 1.54}],
        "hydra": [{"tokens_per_forward": 1.65}],
        "accounting": [{"rows": 3}],
    },
}  # fmt: skip


def test_every_arm_with_the_metric_has_a_line(tmp_path):
    one = Image.open(save_claim(RESULT, tmp_path / "one.png"))
    more = {**RESULT["arms"], "hydra++": [{"tokens_per_forward": 1.8}]}
    two = Image.open(save_claim({**RESULT, "arms": more}, tmp_path / "two.png"))
    assert one.width == two.width and one.height < two.height


def test_a_result_without_figures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no arm of hydra has a tokens_per_forward"):
        save_claim({**RESULT, "arms": {"accounting": [{"rows": 3}]}}, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
