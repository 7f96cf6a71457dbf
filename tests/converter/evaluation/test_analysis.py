"""The analysis executor against loops: quality, positions, kinds of sites, answers, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from analysis_loops import LENGTH, Make, by_hand, check, tiny, windows
from models import MODEL_TYPES
from torch import Tensor
from torch.nn import functional as F

from sparsegate.converter.arch.site import Site
from sparsegate.converter.evaluation.analysis.answers import sparse_answers
from sparsegate.converter.evaluation.analysis.executor import analyse, analyse_all
from sparsegate.converter.evaluation.analysis.selectors import top_k
from sparsegate.converter.evaluation.analysis.setting import LABELS, Setting
from sparsegate.converter.evaluation.quality import clustered_error
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.modeling.gradients import attribute
from sparsegate.converter.modeling.taps import Fields, linear_parts, tapped
from sparsegate.converter.scores import Context, load_score
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError


@pytest.mark.parametrize("source", ["dense", "own"])
def test_quality_in_loops(tiny_model: Make, source: str) -> None:
    """Magnitude by top-k, padding included: masks from the dense model or from the run itself; the two differ."""
    model, arch = tiny(tiny_model)
    batches = windows()
    norms = [
        model.get_submodule(f"{arch.ffn_module(layer)}.down_proj").weight.detach().norm(dim=0) for layer in range(2)
    ]
    dense: dict[Site, Tensor] = {}
    with torch.no_grad(), tapped(model, arch, ["ffn"], lambda site, fields: dense.__setitem__(site, fields["z"])):
        model(input_ids=batches.tokens)

    def keep(row: int, layer: int, z: Tensor) -> Tensor:
        z = dense[Site(layer)][row, : len(z)] if source == "dense" else z
        kept = torch.zeros_like(z, dtype=torch.bool)
        for t in range(len(z)):
            for i in sorted(range(z.shape[1]), key=lambda i: -float(z[t, i].abs() * norms[layer][i]))[:53]:
                kept[t, i] = True
        return kept

    outcome = analyse(model, arch, batches, Setting("magnitude", 0.3, masks=source))
    check(outcome, by_hand(model, arch, batches, keep), 19 + 19 + 12)
    assert (
        outcome.masks == source
        and outcome.density == {"ffn": pytest.approx(53 / 176)}
        and outcome.sparsity == pytest.approx(123 / 176)
    )
    assert outcome.oracle and outcome.phase == "post" and outcome.kl > 0.01
    json.dumps(outcome.as_json())


def test_errors_are_those_between_windows(tiny_model: Make) -> None:
    """Of windows of 19, 19 and 12 scored tokens, each analysed by itself; one window tells none."""
    model, arch = tiny(tiny_model)
    batches, setting = windows(), Setting("gate", 0.3)
    single = [
        analyse(model, arch, Batches(batches.tokens[k : k + 1], batches.mask[k : k + 1]), setting) for k in range(3)
    ]
    outcome = analyse(model, arch, batches, setting)
    counts = torch.tensor([one.tokens for one in single], dtype=torch.float64)
    kls = torch.tensor([one.kl for one in single], dtype=torch.float64)
    rises = torch.tensor([one.nll - one.nll_dense for one in single], dtype=torch.float64)
    assert outcome.kl == pytest.approx(float((kls * counts).sum() / counts.sum()), rel=1e-4)
    assert outcome.kl_error == pytest.approx(clustered_error(kls * counts, counts), rel=1e-3)
    assert outcome.nll_error == pytest.approx(clustered_error(rises * counts, counts), rel=1e-3)
    assert single[0].kl_error is None and single[0].nll_error is None


@pytest.mark.parametrize("label", LABELS)
def test_oracle_quality_in_loops(tiny_model: Make, label: str) -> None:
    """Corrected GxO with each label, masks from the local gradients of the dense model, fixed before any is applied."""
    model, arch = tiny(tiny_model)
    batches = windows(1)
    with torch.no_grad():
        logits = model(input_ids=batches.tokens).logits
    wanted = logits.topk(2).indices[..., LABELS.index(label) // 2]
    if label == "true":
        wanted = torch.cat([torch.where(batches.mask[:, 1:], batches.tokens[:, 1:], -100), torch.full((3, 1), -100)], 1)
    sites = attribute(model, arch, batches.tokens, labels=wanted).sites

    def keep(row: int, layer: int, z: Tensor) -> Tensor:
        fields = Context(z=sites[Site(layer)].value[row, : len(z)], grad=sites[Site(layer)].grad[row, : len(z)])
        return top_k(load_score("corrected_gxo").score(fields), 0.4)

    outcome = analyse(model, arch, batches, Setting("corrected_gxo", 0.4, label=label))
    check(outcome, by_hand(model, arch, batches, keep), 50)
    assert outcome.oracle and outcome.masks == "dense"


def test_position_policies(tiny_model: Make) -> None:
    """Dense positions keep everything and are not scored; densities with and without them."""
    model, arch = tiny(tiny_model)
    batches = windows(padded=False)
    settings = [
        Setting("gate", 0.25, positions=positions, prompt=prompt)
        for positions, prompt in (("all", 0), ("first", 0), ("prefill", 5))
    ]
    for first, outcome in zip((0, 1, 5), analyse_all(model, arch, batches, settings), strict=True):
        keep_gate: dict[tuple[int, int], Tensor] = {}  # by the scores of the sparse run itself: taken by running it

        def keep(
            row: int, layer: int, z: Tensor, first: int = first, keep_gate: dict[tuple[int, int], Tensor] = keep_gate
        ) -> Tensor:
            return keep_gate[row, layer] | (torch.arange(len(z)) < first)[:, None]

        for row in range(3):

            def see(
                site: Site, fields: Fields, row: int = row, first: int = first, keep_gate: dict = keep_gate
            ) -> Tensor:
                keep_gate[row, site.layer] = top_k(fields["gate"].abs(), 0.25)[0]
                return (keep_gate[row, site.layer] | (torch.arange(LENGTH) < first)[:, None])[None]

            with torch.no_grad(), tapped(model, arch, ["ffn"], see):
                model(input_ids=batches.tokens[row : row + 1])
        check(outcome, by_hand(model, arch, batches, keep, first), 3 * (19 - first))
        share = (LENGTH - first) / LENGTH
        assert outcome.density == {"ffn": 0.25} and outcome.sparsity == pytest.approx(0.75)
        assert outcome.density_all["ffn"] == pytest.approx(1 - 0.75 * share) and outcome.sparsity_all == pytest.approx(
            0.75 * share
        )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_full_density_is_the_dense_model(tiny_model: Make, model_type: str) -> None:
    """Every kind on every architecture; and keeping next to nothing is not dense."""
    model, arch = tiny(tiny_model, model_type)
    batches = windows()
    settings = [
        Setting("abs_z", 1.0, kinds=("ffn", "attn")),
        Setting("wina", 1.0, kinds=("linear",)),
        Setting("abs_z", 0.0, kinds=("attn",)),
    ]
    settings += [Setting("input", 0.0, kinds=("linear",)), Setting("abs_z", 0.0)]
    *same, heads, channels, neurons = analyse_all(model, arch, batches, settings)
    for outcome in same:
        assert (
            outcome.kl < 1e-6
            and outcome.agreement == 1
            and outcome.sparsity == 0
            and outcome.nll == pytest.approx(outcome.nll_dense, abs=1e-6)
        )
    assert min(outcome.kl for outcome in (heads, channels, neurons)) > 1e-3
    assert heads.sparsity == channels.sparsity == neurons.sparsity == 1
    assert len(channels.sites) == len(arch.linears()) * arch.size(model.config, "layers")


def test_f12_heads_are_whole(tiny_model: Make) -> None:
    """int(H k) heads a token by L2 norm; a head masked before the output projection is a head whose columns of it are
    zero.
    """
    model, arch = tiny(tiny_model)
    batches = windows()
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def see(site: Site, fields: Fields) -> Tensor:
        scores = load_score("magnitude").score_heads(Context(o=fields["o"]))
        seen[site] = (scores, top_k(scores, int(4 * 0.6) / 4))
        return seen[site][1]

    with torch.no_grad(), tapped(model, arch, ["attn"], see):
        model(input_ids=batches.tokens)
    for scores, keep in seen.values():
        assert bool((keep.sum(-1) == int(4 * 0.6)).all())
        assert bool(
            (scores.masked_fill(~keep, torch.inf).amin(-1) > scores.masked_fill(keep, -torch.inf).amax(-1)).all()
        )
    fixed = torch.tensor([True, False, True, True])
    with torch.no_grad(), tapped(model, arch, ["attn"], lambda site, fields: fixed.expand(fields["o"].shape[:-1])):
        masked = model(input_ids=batches.tokens).logits
    with torch.no_grad():
        for layer in range(2):
            model.get_submodule(f"{arch.attn_module(layer)}.o_proj").weight[:, 16:32] = 0
        torch.testing.assert_close(model(input_ids=batches.tokens).logits, masked, rtol=1e-4, atol=1e-5)
        assert float((load_dense(tiny_model("llama"))(input_ids=batches.tokens).logits - masked).abs().max()) > 1e-2


def test_sparsity_weighs_parameters(tiny_model: Make) -> None:
    """Heads with grouped queries: a group counts while any of its heads does. Both kinds: every site by its weights."""
    model, arch = tiny(tiny_model)
    batches = windows()
    heads, both = analyse_all(
        model, arch, batches, [Setting("abs_z", 0.25, kinds=("attn",)), Setting("abs_z", 0.25, kinds=("ffn", "attn"))]
    )
    kept = total = 0
    with (
        torch.no_grad(),
        tapped(model, arch, ["attn"], lambda site, fields: norms.__setitem__(site, fields["o"].norm(dim=-1))),
    ):
        norms: dict[Site, Tensor] = {}
        model(input_ids=batches.tokens)
    for scores in norms.values():
        for row in scores[batches.mask].tolist():
            total += (
                4 * (64 + 64) * 16 + 2 * (64 + 64) * 16
            )  # q rows and o columns of four heads, k and v rows of two groups
            kept += (64 + 64) * 16 + (64 + 64) * 16  # one head, and with it one whole group
            assert len(row) == 4
    assert heads.sparsity == pytest.approx(1 - kept / total) and heads.density == {"attn": 0.25}
    attention, network = (4 + 2) * 2 * 64 * 16, 3 * 64 * 176
    assert both.sparsity == pytest.approx((attention * heads.sparsity + network * 0.75) / (attention + network))
    two = analyse(model, arch, batches, Setting("abs_z", 0.5, kinds=("attn",)))
    assert 1 - 8 / 12 - 1e-9 < two.sparsity < 1 - 6 / 12, "two heads use one group or two"
    plain, plain_arch = tiny(tiny_model, "phi")
    assert analyse(plain, plain_arch, batches, Setting("abs_z", 0.5, kinds=("attn",))).sparsity == pytest.approx(0.5)


def test_linear_channels_of_packed_weights(tiny_model: Make) -> None:
    """phi3 packs q, k, v and gate, up: each part is cut by its own column norms."""
    model, arch = tiny(tiny_model, "phi3")
    batches = windows(padded=False)
    outcome = analyse(model, arch, batches, Setting("wina", 0.5, kinds=("linear",)))
    for layer in range(2):
        for name, parts in linear_parts(model, arch, layer).items():
            linear = model.get_submodule(name)

            def forward(x: Tensor, linear: Any = linear, parts: dict = parts) -> Tensor:
                outs = []
                for part in parts.values():
                    w = linear.weight[part]
                    score = x.abs() * w.norm(dim=0)
                    outs.append(
                        F.linear(x * (score >= score.sort(-1).values[..., -(x.shape[-1] // 2)][..., None]), w, None)
                    )
                return torch.cat(outs, -1)

            linear.forward = forward
    with torch.no_grad():
        sparse = model(input_ids=batches.tokens).logits
    nll = F.cross_entropy(sparse[:, :-1].flatten(0, 1), batches.tokens[:, 1:].flatten())
    assert outcome.nll == pytest.approx(float(nll), abs=1e-4) and outcome.sparsity == pytest.approx(0.5)
    assert outcome.sites["layers.0.linear.k_proj"] == 0.5


def test_answers_in_loops(tiny_model: Make) -> None:
    """Prompt and first token dense, later steps under the masks of the dense answer or of the run itself: against
    passes over the whole text, no cache.
    """
    model, arch = tiny(tiny_model)
    prompts, new = windows(padded=False).tokens[:, :7], 6
    settings = [
        Setting("abs_z", 1.0),
        Setting("corrected_gxo", 0.2),
        Setting("gate", 0.2),
        Setting("abs_z", 0.25, kinds=("attn",)),
    ]
    dense, (same, oracle, gate, heads) = sparse_answers(model, arch, prompts, new, settings)
    expected = model.generate(
        prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 7:]
    assert torch.equal(dense, expected) and torch.equal(same, dense)
    sites = attribute(model, arch, torch.cat([prompts, dense[:, :-1]], 1)).sites
    corrected, norm = load_score("corrected_gxo").score, load_score("abs_z").score_heads
    fixed = {
        site: top_k(corrected(Context(z=v.value, grad=v.grad)), 0.2) for site, v in sites.items() if site.kind == "ffn"
    }
    fixed |= {site: top_k(norm(Context(o=v.value)), 0.25) for site, v in sites.items() if site.kind == "attn"}
    for kind, answer, own in (("ffn", oracle, False), ("ffn", gate, True), ("attn", heads, False)):
        tokens = prompts
        for _ in range(new):

            def see(site: Site, fields: Fields, own: bool = own, length: int = tokens.shape[1]) -> Tensor:
                keep = top_k(fields["gate"].abs(), 0.2) if own else fixed[site][:, :length]
                return keep | (torch.arange(length) < 7)[:, None]

            with torch.no_grad(), tapped(model, arch, [kind], see):
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(answer, tokens[:, 7:]), (kind, own)
        assert torch.equal(answer[:, 0], dense[:, 0]) and not torch.equal(answer, dense)
    with pytest.raises(InputError, match="new must be"):
        sparse_answers(model, arch, prompts, 1, settings)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        (Setting("gate", 0.5, kinds=("attn",)), "kinds of score gate"),
        (Setting("wina", 0.5), "kinds of score wina must be among linear"),
        (Setting("gxo", 0.5, masks="own"), "masks of gxo"),
        (Setting("gate", 0.5, masks="own", selector="global_pool"), "masks of gate"),
        (Setting("griffin", 0.5), "positions of score griffin"),
        (Setting("griffin", 0.5, selector="threshold", positions="prefill", prompt=4), "selector of score griffin"),
        (Setting("gate", 0.5, positions="prefill", prompt=19), "prompt must be in 1..18"),
        (Setting("gate", 0.5, selector="threshold"), "needs calibration"),
        (Setting("chess", 0.5), "needs calibration"),
        (Setting("gate", 0.5, selector="best"), "selector must be one of"),
        (Setting("gate", 0.5, label="gold"), "label must be one of"),
        (Setting("nothing", 0.5), "score must be one of"),
    ],
)
def test_refusals(tiny_model: Make, setting: Setting, match: str) -> None:
    model, arch = tiny(tiny_model)
    with pytest.raises(InputError, match=match):
        analyse(model, arch, windows(), setting)
