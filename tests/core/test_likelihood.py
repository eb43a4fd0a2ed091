"""What a likelihood counts: every element that exists and was not given, and nothing else; and which parts fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seriatim.backbones.mamba import Mamba, MambaConfig
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Truncate
from seriatim.conditions.condition import Condition
from seriatim.decoding.loop import generate
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import CodesEmbed, TokenEmbed, VectorEmbed
from seriatim.embed_kinds import ByKind
from seriatim.factorization.line import Line
from seriatim.factorization.static import AnyOrder, Blocks, Scales
from seriatim.heads.categorical import CategoricalHead
from seriatim.heads.depthwise import DepthwiseHead
from seriatim.heads.flow import FlowConfig, FlowHead
from seriatim.heads.group import GroupHead
from seriatim.heads.in_place import InPlaceHead
from seriatim.heads.insertion import InsertionHead
from seriatim.laws.case import randomise
from seriatim.laws.tabular import tabular
from seriatim.layout import grid, line
from seriatim.model import Model
from seriatim.plan import OrderError
from seriatim.random import enumerate_law
from seriatim.slots import Reads

STOP = 1


def backbone(width=8):
    return Transformer(TransformerConfig(width, 1, 1))


def model_of(order, layout, vocab=2):
    positions = tuple(int(layout.coord[:, a].max()) + 1 for a in range(layout.coord.shape[1]))
    embed = TokenEmbed(vocab, 8, mask=True, positions=positions)
    return randomise(Model(layout, order, embed, backbone(), CategoricalHead(8, vocab)))


@pytest.mark.parametrize(
    ("order", "layout"),
    [(Line(1), line(4)), (Blocks(2), line(4)), (Blocks(3), line(5)), (Blocks(1), line(3)), (Blocks(2), grid(2, 2))],
    ids=["line", "blocks of 2", "blocks of 3", "blocks of 1", "rows of a grid"],
)
def test_the_law_of_texts_that_end_early_is_a_distribution(order, layout):
    """What a stop id cuts off is no part of a text: likelihoods sum to 1, and are those of the decoder."""
    model, likelihood = model_of(order, layout), {}

    def run(random):
        canvas = generate(Target(model), model.blank(1), SampleAll(stop=(STOP,)), random=random)
        text = tuple(canvas.read("token")[0].tolist())
        with torch.no_grad():
            likelihood[text] = float(model.log_prob(canvas).exp())
        return text

    law = enumerate_law(run)
    assert any(STOP in text for text in law) and len({len(text) for text in law}) > 1
    assert abs(sum(likelihood.values()) - 1) < 1e-9
    assert max(abs(law[text] - likelihood[text]) for text in law) < 1e-9


def test_a_group_that_ends_early_is_counted_up_to_its_stop_id():
    """Also where the order inside the head reads what is cut off."""
    inner = Model(
        line(3, "byte"), Blocks(2), TokenEmbed(2, 8, "byte", mask=True, positions=(3,)), backbone(),
        CategoricalHead(8, 2), {"state": _Ignored()},
    )  # fmt: skip
    head = randomise(GroupHead(inner, stop=STOP))
    words = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    h = torch.ones(1, 1, 8, dtype=torch.float64).expand(4, -1, -1)
    with torch.no_grad():
        total = head.dist(h, None, None).log_prob(words[:, None]).exp().sum()
    assert abs(float(total) - 1) < 1e-9


class _Ignored(nn.Module):
    """A condition that says nothing."""

    has_null = False

    def forward(self, raw, drop=None):
        return Condition()


class Shows(Scales):
    """Reads given elements too."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        element = torch.arange(canvas.layout.size)[None]
        object.__setattr__(plan, "reads", Reads(element, element))
        return plan


def test_a_given_element_is_never_counted():
    """Even by an order that reads it, and that was checked where nothing was given."""
    model = tabular(line(4), Shows(), 3)
    x = {"token": torch.randint(3, (2, 4), generator=torch.Generator().manual_seed(0))}
    assert bool((model.losses(model.canvas(x)) > 0).all())
    losses = model.losses(model.canvas(x, torch.tensor([2, 0])))
    assert torch.equal(losses > 0, torch.tensor([[False, False, True, True], [True] * 4]))
    model = tabular(line(4), Shows(), 3)
    with pytest.raises(OrderError, match="slot 0 reads element 0, which is given and must not be read"):
        model.losses(model.canvas(x, 2))


class Forgets(Blocks):
    """Reads no last element."""

    def packed(self, canvas):
        plan = super().packed(canvas)
        read = plan.reads.element.masked_fill(plan.reads.element == canvas.layout.size - 1, -1)
        object.__setattr__(plan, "reads", Reads(plan.reads.slot, read))
        return plan


def test_an_order_that_forgets_an_element_is_refused_by_training_and_by_decoding():
    model = tabular(line(4), Forgets(2), 3)
    with pytest.raises(OrderError, match="no slot reads element 3, which is to be decided"):
        model.losses(model.blank(2))
    with pytest.raises(OrderError, match="no slot reads element 3, which is to be decided"):
        generate(Target(model), model.blank(2), SampleAll())


@pytest.mark.parametrize(
    "known",
    [
        0,
        torch.tensor([1, 0]),
        torch.tensor([[True, False, False, False], [False, True, False, False]]),
        torch.tensor([False, False, True, False]),
    ],
    ids=["nothing", "ragged", "marked in each row", "marked"],
)
def test_without_a_prefix_the_first_element_is_given_in_every_row_or_there_is_no_likelihood(known):
    """It would be left out of the likelihood in silence."""
    model = tabular(line(4), Line(0), 3)
    x = {"token": torch.zeros(2, 4, dtype=torch.long)}
    row = 1 if isinstance(known, torch.Tensor) and known.shape[0] == 2 else 0
    with pytest.raises(OrderError, match=f"must be given .a start token., in every row; in row {row} it is not"):
        model.losses(model.canvas(x, known))


def test_without_a_prefix_rows_of_different_lengths_have_a_likelihood():
    """Also one of which nothing is left."""
    model = tabular(line(4), Line(0), 3)
    x = {"token": torch.zeros(3, 4, dtype=torch.long)}
    canvas = model.canvas(x, torch.tensor([1, 3, 1])).apply([Truncate(torch.tensor([4, 4, 2]))])
    counted = model.losses(canvas) > 0
    assert counted.tolist() == [[False, True, True, True], [False, False, False, True], [False, True, False, False]]


# ---- parts that fit --------------------------------------------------------------------------------------------------


def join(embed=None, body=None, head=None, order=None):
    return Model(
        line(4), order or Line(1), embed or TokenEmbed(5, 8), body or backbone(), head or CategoricalHead(8, 5)
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"embed": TokenEmbed(5, 16)}, "the embedding is 16 wide and the backbone 8"),
        ({"embed": CodesEmbed(5, 2, 16)}, "the embedding is 16 wide and the backbone 8"),
        ({"embed": VectorEmbed(3, 16)}, "the embedding is 16 wide and the backbone 8"),
        ({"embed": ByKind({"token": TokenEmbed(5, 8)}, 16)}, "the embedding is 16 wide and the backbone 8"),
        ({"head": CategoricalHead(16, 5)}, "the head of 'token' is 16 wide and the backbone 8"),
        ({"head": DepthwiseHead(16, 5, 2, TransformerConfig(8, 1, 1))}, "'token' is 16 wide and the backbone 8"),
        ({"head": FlowHead(16, 3, FlowConfig(8, 1))}, "the head of 'token' is 16 wide and the backbone 8"),
        ({"head": InPlaceHead(16, 3)}, "the head of 'token' is 16 wide and the backbone 8"),
        ({"head": InsertionHead(16, 5)}, "the head of 'token' is 16 wide and the backbone 8"),
        ({"body": Mamba(MambaConfig(16, 1, head_dim=8, state=8))}, "the embedding is 8 wide and the backbone 16"),
        ({"head": CategoricalHead(8, 30)}, "the head of 'token' predicts 30 ids and the embedding knows 5"),
        (
            {"head": CategoricalHead(8, 30), "embed": ByKind({"token": TokenEmbed(5, 8)}, 8)},
            "the head of 'token' predicts 30 ids and the embedding knows 5",
        ),
        (
            {"head": DepthwiseHead(8, 30, 2, TransformerConfig(8, 1, 1)), "embed": CodesEmbed(5, 2, 8)},
            "the head of 'token' predicts 30 ids and the embedding knows 5",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_they_are_joined(parts, message):
    with pytest.raises(ValueError, match=message):
        join(**parts)


def test_an_embedding_may_know_more_ids_than_the_head_predicts():
    """Those of a prompt, or of another kind."""
    assert join(embed=TokenEmbed(9, 8)).embed.vocab == 9
    assert join(embed=TokenEmbed(3, 8, "word"), order=AnyOrder()).embed.vocab == 3
