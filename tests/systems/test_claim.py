"""Verdicts follow the rule that was written down before: direction, margin, and noise measured on the baseline."""

import json

import pytest

from seriatim.cli.main import main
from seriatim.systems.claim import Arm, Claim, Trial
from seriatim.verbs import claim as verb


def a_claim(**changes) -> Claim:
    arms = {"new": Arm("next-token"), "old": Arm("next-token")}
    return Claim("new is better", "paper", "loss", arms, "new", "old", **changes)


@pytest.mark.parametrize(
    ("better", "margin", "ours", "verdict"),
    [
        ("lower", 1.0, 0.5, "holds"), ("lower", 1.0, 1.5, "fails"), ("lower", 1.0, 0.95, "within noise"),
        ("higher", 1.0, 1.5, "holds"), ("higher", 1.0, 0.5, "fails"), ("higher", 1.0, 1.05, "within noise"),
        ("lower", 2.0, 0.7, "fails"), ("lower", 2.0, 0.3, "holds"), ("lower", 0.5, 1.5, "holds"),
        ("lower", 0.5, 2.5, "fails"), ("higher", 0.5, 0.8, "holds"), ("higher", 2.0, 1.5, "fails"),
    ],
)  # fmt: skip
def test_a_verdict_follows_direction_margin_and_noise(better, margin, ours, verdict):
    """The baseline has mean 1 and a standard deviation of 0.05, so that 0.15 is noise."""
    baseline = [0.95, 1.05, 0.95, 1.05, 1.0]
    assert a_claim(better=better, margin=margin).verdict([ours], baseline) == verdict


def test_a_verdict_needs_a_spread():
    with pytest.raises(ValueError, match="two of the baseline"):
        a_claim().verdict([1.0], [1.0])


def test_an_interval_of_the_difference_is_welchs():
    """By hand: variances 1 and 4 of three seeds each, 2.94 degrees of freedom, a quantile of 3.2188."""
    low, high = a_claim().interval([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (low + high) / 2 == pytest.approx(-2.0)
    assert (high - low) / 2 == pytest.approx(3.21876 * (5 / 3) ** 0.5, rel=1e-4)
    assert a_claim().interval([1.0], [1.0, 2.0]) is None
    assert a_claim().interval([1.0, 1.0], [3.0, 3.0]) == (-2.0, -2.0)


def test_the_rule_says_metric_direction_and_seeds():
    assert a_claim(margin=2.0).rule == (
        "the mean loss of new is lower than that of old divided by 2, by more than three standard deviations of "
        "old over 5 seeds"
    )


def test_arms_that_the_verdict_does_not_need_may_have_fewer_seeds():
    arms = dict.fromkeys(("ours", "theirs", "ablation"), Trial("m", lambda system, seed: {}))
    claim = Claim("", "", "loss", arms, "ours", "theirs", seeds=(0, 1), spread_seeds=(0, 1, 2), other_seeds=(0,))
    assert claim.queue() == [("theirs", 0), ("theirs", 1), ("theirs", 2), ("ours", 0), ("ours", 1), ("ablation", 0)]


def test_a_queue_is_worked_off_once_and_leaves_a_result(tmp_path, monkeypatch, capsys):
    """Five seeds of the baseline and two of ours; what is finished is not trained again."""
    trained = []

    def train(key, data, *, out, settings, **more):
        trained.append((key, settings["seed"], settings.get("width")))
        out.mkdir(parents=True)
        (out / "run.json").write_text("{}")
        return type("Trained", (), {"system": None, "data": None, "history": [{"seconds": 2.0}]})

    def judge(trained):
        return {"loss": 1.0 + 0.01 * len(trained_before())}

    def trained_before():
        return trained

    arms = {"new": Arm("a", {"width": 8}, measure=lambda t: {"loss": 0.2}), "old": Arm("b", measure=judge)}
    claim = Claim("new is better", "paper", "loss", arms, "new", "old")
    monkeypatch.setattr(verb, "train", train)
    monkeypatch.setattr(verb, "HOME", tmp_path / "home")
    monkeypatch.setattr(verb, "claim_of", lambda key: claim)
    monkeypatch.setattr("seriatim.cli.claiming.claim_of", lambda key: claim)
    results = tmp_path / "results"
    assert main(["claim", "next-token", "--results", str(results)]) == 0
    assert trained == [("b", seed, None) for seed in range(5)] + [("a", seed, 8) for seed in range(2)]
    assert main(["claim", "next-token", "--results", str(results)]) == 0
    assert len(trained) == 7, "nothing is trained twice"
    result = json.loads((results / "next-token.json").read_text(encoding="utf-8"))
    assert result["verdict"] == "holds" and result["ours"] == pytest.approx(0.2) and result["train_seconds"] == 14.0
    keys = "key claim paper metric arms ours baseline ratio verdict rule seeds train_seconds machine command commit"
    assert set(keys.split()) <= result.keys()
    capsys.readouterr()
    assert main(["claims", "--results", str(results)]) == 0
    assert "holds" in capsys.readouterr().out


def test_what_an_arm_needs_is_missed_before_anything_is_run(tmp_path, monkeypatch):
    arms = {"new": Arm("var", tokenizer="zoo:no-such"), "old": Arm("var", tokenizer="zoo:image-msvq")}
    monkeypatch.setattr(verb, "HOME", tmp_path)
    monkeypatch.setattr(verb, "claim_of", lambda key: Claim("new is better", "paper", "fd_s", arms, "new", "old"))
    monkeypatch.setattr(verb, "train", lambda *rest, **more: pytest.fail("an arm was trained"))
    with pytest.raises(FileNotFoundError, match=r"needs zoo:no-such.*benchmarks/zoo\.py no-such"):
        verb.measure("var", tmp_path)


def test_an_arm_that_claims_have_in_common_is_trained_once(tmp_path, monkeypatch):
    """Where system, settings, size, tokenizer, length, data and seed are the same, and the usual figures judge it."""
    monkeypatch.setattr(verb, "HOME", tmp_path)

    def place(arm, seed=0, key="first", data="glyphs"):
        claim = Claim("", "", "loss", {"ours": arm, "theirs": arm}, "ours", "theirs", data=data)
        return verb._figures_file(key, claim, "ours", seed)

    one = place(Arm("var", {"width": 8}, "small", minutes=4))
    assert one == place(Arm("var", {"width": 8}, "small", minutes=4), key="second")
    others = [
        place(Arm("var", {"width": 9}, "small", minutes=4)), place(Arm("var", {"width": 8}, "tiny", minutes=4)),
        place(Arm("var", {"width": 8}, "small", minutes=3)), place(Arm("sar", {"width": 8}, "small", minutes=4)),
        place(Arm("var", {"width": 8}, "small", minutes=4), seed=1),
        place(Arm("var", {"width": 8}, "small", minutes=4), data="emoji"),
        place(Arm("var", {"width": 8}, "small", minutes=4, sampling={"guidance": 0.0})),
        place(Arm("var", {"width": 8}, "small", minutes=4, measure=lambda trained: {})),
        place(Trial(None, lambda model, seed: {}), key="second"),
    ]  # fmt: skip
    assert len({one, *others}) == 1 + len(others)
