import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Chain, make_attack, make_classifier
from torch import nn

from art_clat.attacks.tensor_attack import TensorAttack
from art_clat.config import Budget, SelectionOptions
from art_clat.layers.discovery import find_layers
from art_clat.models.tensor_classifier import TensorClassifier
from art_clat.selection import rules
from art_clat.selection.budget import check_budget, take_layers
from art_clat.selection.candidates import Candidates
from art_clat.selection.choice import choose, eligible_layers
from art_clat.selection.criticality import measure_criticality
from art_clat.selection.rules import SELECTION_RULES, as_rule, list_selection_rules, register_selection_rule
from art_clat.utils.batch import Batch


def make_candidates(model, data, *, seed=0, round=0, eligible=None):
    classifier = make_classifier(model)
    network = TensorClassifier(classifier)
    layers = find_layers(model, lambda size: model(torch.tensor(data[0][:size])))
    x, y = torch.tensor(data[0]), torch.tensor(data[1])
    batches = [Batch.whole(a, b) for a, b in zip(x.split(20), y.split(20), strict=True)]  # uneven: 20, 20, 8
    attack = TensorAttack(make_attack(classifier), network)
    return Candidates(network, layers, eligible or layers, batches, attack, seed, round)


def names(layers):
    return [layer.name for layer in getattr(layers, "layers", layers)]


class TestBudget:
    def layers(self, nb_layers):
        return [SimpleNamespace(name=str(i), nb_parameters=10 * (i + 1)) for i in range(nb_layers)]

    @pytest.mark.parametrize(("nb_layers", "count"), [(7, 1), (20, 1), (29, 1), (31, 2), (50, 2), (53, 3), (90, 4)])
    def test_share_is_of_all_layers_rounded(self, nb_layers, count):
        layers = self.layers(nb_layers)
        assert (
            take_layers(Budget(share=0.05), layers[: nb_layers // 2 + 2], nb_layers=nb_layers, nb_parameters=1)
            == layers[:count]
        )

    def test_count(self):
        layers = self.layers(5)
        assert take_layers(Budget(count=2), layers, nb_layers=5, nb_parameters=1) == layers[:2]
        assert take_layers(Budget(count=9), layers, nb_layers=5, nb_parameters=1) == layers

    def test_filling_passes_over_layers_that_do_not_fit(self):
        small, middle, large = layers = self.layers(3)
        of_sixty = {"nb_layers": 3, "nb_parameters": 60}
        budget = Budget(parameter_share=0.5, fill=True)
        assert take_layers(budget, [middle, large, small], **of_sixty) == [middle, small]
        every = [large, middle, small]
        assert take_layers(Budget(parameter_share=1.0, fill=True), every, **of_sixty) == every
        check_budget(Budget(parameter_share=10 / 60, fill=True), layers, 60)
        with pytest.raises(ValueError, match="pays for no layer: the smallest that may be chosen, 0, has 10"):
            check_budget(Budget(parameter_share=9.9 / 60, fill=True), layers, 60)

    def test_a_share_of_the_parameters_is_taken_in_order(self, caplog):
        one, two, three, four, five = layers = self.layers(5)  # 10, 20, 30, 40 and 50 parameters
        of_hundreds = {"nb_layers": 5, "nb_parameters": 1000}

        def take(share, *ranked):
            return take_layers(Budget(parameter_share=share), ranked, **of_hundreds)

        assert take(0.05, two, three, one) == [two, three]  # 50 of 50
        assert take(0.05, three, four, one) == [three]  # stops; the worse layer is not taken instead
        assert take(0.03, five, one, four, two, three) == [one, two]  # the larger ones are passed over
        assert take(0.0455, five, one) == [five]  # 50 is within a tenth of 45.5
        assert take(0.045, five, one) == [one]
        assert take(0.03, four, three) == [three]
        check_budget(Budget(parameter_share=0.0095), layers, 1000)
        with pytest.raises(ValueError, match="pays for no layer"):
            check_budget(Budget(parameter_share=0.009), layers, 1000)
        with caplog.at_level(logging.INFO, logger="art_clat.selection.budget"):
            take(0.03, five, one, four, two)
        assert [r.getMessage() for r in caplog.records] == [
            "Larger than the budget parameter_share=0.03, and passed over: 4, 3."
        ]

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"count": 1, "fill": True},
         {"share": 0.1, "count": 1}, {"share": 0}, {"share": 1.1}, {"count": 0}, {"count": 1.5}, {"count": True},
         {"parameter_share": math.nan}, {"parameter_share": "5 %"}],
    )  # fmt: skip
    def test_bad_input(self, arguments):
        with pytest.raises(ValueError, match=r"share|count"):
            Budget(**arguments)


class TestRules:
    @pytest.fixture
    def candidates(self, chain, data):
        return make_candidates(chain, data)

    @pytest.mark.parametrize(
        ("rule", "figure"),
        [
            ("criticality", "criticality"),
            ("criticality_rms", "rms_criticality"),
            ("relative_criticality", "relative_criticality"),
            ("relative_error", "relative_error"),
        ],
    )
    def test_take_the_largest_of_what_was_measured(self, candidates, chain, data, rule, figure):
        classifier = candidates.classifier.estimator
        measured = measure_criticality(classifier, *data, attack=make_attack(classifier))
        index = {layer.name: getattr(layer, figure) for layer in measured}
        for count in (1, 2, 3):
            chosen = names(choose(as_rule(rule), candidates, Budget(count=count)))
            assert set(chosen) == set(sorted(index, key=index.get)[-count:])
            assert chosen == [name for name in index if name in chosen]  # in execution order

    def test_relative_figures_ignore_the_scale_of_a_layer(self, chain, data):
        scaled = Chain()
        scaled.load_state_dict(chain.state_dict())
        with torch.no_grad():  # ReLU passes the factor on, and the next layer cancels it
            scaled.first.weight.mul_(7)
            scaled.first.bias.mul_(7)
            scaled.second.weight.div_(7)
        one, other = (make_candidates(model, data).criticality for model in (chain, scaled))
        for a, b in zip(one, other, strict=True):
            assert b.relative_error == pytest.approx(a.relative_error, rel=1e-3)
            assert b.relative_criticality == pytest.approx(a.relative_criticality, rel=1e-3)
        assert other[0].criticality == pytest.approx(7 * one[0].criticality, rel=1e-3)

    def test_relative_figures_by_hand(self, candidates, chain, data):
        x, y = torch.tensor(data[0]), torch.tensor(data[1])
        x_adv = candidates.attack(Batch.whole(x, y))
        with torch.no_grad():
            clean, perturbed = ({"x": z.flatten(1), **chain.features(z)} for z in (x, x_adv))
        errors = {}
        for name in clean:
            rows = [((p - c).norm() / c.norm()).item() for p, c in zip(perturbed[name], clean[name], strict=True)]
            errors[name] = np.mean(rows)
        for before, entry in zip(clean, candidates.criticality, strict=False):
            assert entry.relative_error == pytest.approx(errors[entry.name], rel=1e-4)
            assert entry.relative_criticality == pytest.approx(errors[entry.name] / errors[before], rel=1e-4)

    def test_gradient_prominence_is_the_mean_magnitude_of_the_weighed_gradients(self, candidates, chain, data):
        x, y = torch.tensor(data[0]), torch.tensor(data[1])
        x_adv = torch.cat([adversarial for _, adversarial in candidates.adversarial])
        parameters = dict(chain.named_parameters())

        def gradients(z):
            loss = nn.functional.cross_entropy(chain.features(z)["head"], y)
            return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

        clean, robust = gradients(x), gradients(x_adv)
        scores = as_rule("gradient_prominence")(candidates)
        for layer, score in zip(candidates.layers, scores, strict=True):
            held = [name for name in parameters if name.startswith(layer.name + ".")]
            weighed = torch.cat([(0.1 * clean[name] + 0.9 * robust[name]).flatten() for name in held])
            assert score == pytest.approx(weighed.abs().mean().item(), rel=1e-4)

    def test_module_robustness_is_the_loss_rise_within_the_ball(self, candidates, chain):
        rises = as_rule("module_robustness_highest")(candidates)
        assert as_rule("module_robustness_lowest")(candidates) == [-rise for rise in rises]
        before = candidates.adversarial_loss()
        for layer, rise in zip(candidates.layers, rises, strict=True):
            weight = chain.get_submodule(layer.name).weight
            original = weight.detach().clone()
            length = original.norm()
            torch.manual_seed(0)
            with torch.no_grad():
                for _ in range(5):  # a random perturbation of that length does less harm
                    noise = torch.randn_like(weight)
                    weight.copy_(original + rules.MODULE_RADIUS * length * noise / noise.norm())
                    assert candidates.adversarial_loss() - before < rise
                weight.copy_(original)
            (gradient,) = torch.autograd.grad(self._loss(candidates, chain), weight)
            first_order = rules.MODULE_RADIUS * length * gradient.norm()
            assert rise == pytest.approx(first_order.item(), rel=0.5)

    def _loss(self, candidates, chain):
        batches = candidates.adversarial
        x_adv, y = torch.cat([x_adv for _, x_adv in batches]), torch.cat([batch.y for batch, _ in batches])
        return nn.functional.cross_entropy(chain.features(x_adv)["head"], y)

    def test_module_robustness_is_of_the_worst_point_on_the_way(self, candidates, monkeypatch):
        losses = np.random.default_rng(0).uniform(0.5, 2, (len(candidates.layers), rules.MODULE_STEPS))
        losses[0] = 0.5  # this layer only lowers the loss
        turns = iter([1.0, *losses.flatten()])
        monkeypatch.setattr(Candidates, "adversarial_loss", lambda _: next(turns))
        rises = as_rule("module_robustness_highest")(candidates)
        assert rises == pytest.approx(np.maximum(losses.max(axis=1), 1.0) - 1.0) and rises[0] == 0

    def test_module_robustness_stays_in_the_ball_and_puts_the_weights_back(self, candidates, chain, monkeypatch):
        before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
        lengths = []
        loss = Candidates.adversarial_loss

        def spying(self):
            moved = [(chain.state_dict()[name] - tensor).norm() / tensor.norm() for name, tensor in before.items()]
            lengths.append(max(moved).item())
            return loss(self)

        monkeypatch.setattr(Candidates, "adversarial_loss", spying)
        as_rule("module_robustness_highest")(candidates)
        assert len(lengths) == 1 + rules.MODULE_STEPS * len(candidates.layers) and lengths[0] == 0
        assert all(0.5 * rules.MODULE_RADIUS < length < 1.0001 * rules.MODULE_RADIUS for length in lengths[1:])
        assert all(torch.equal(tensor, before[name]) for name, tensor in chain.state_dict().items())

    @pytest.mark.parametrize("rule", [rule for rule in list_selection_rules()])
    def test_every_rule_leaves_the_network_as_it_was(self, normed, data, rule):
        normed.conv2.requires_grad_(False)
        candidates = make_candidates(normed, data)
        normed.bn3.eval()
        before = {name: tensor.clone() for name, tensor in normed.state_dict().items()}
        flags = {name: p.requires_grad for name, p in normed.named_parameters()}
        modes = {name: module.training for name, module in normed.named_modules()}
        choose(as_rule(rule), candidates, Budget(count=1))
        assert all(torch.equal(tensor, before[name]) for name, tensor in normed.state_dict().items())
        assert {name: p.requires_grad for name, p in normed.named_parameters()} == flags
        assert {name: module.training for name, module in normed.named_modules()} == modes
        assert all(p.grad is None for p in normed.parameters())
        assert not any(module._forward_hooks for module in normed.modules())

    def test_random_is_drawn_anew_or_once(self, candidates):
        rounds = [replace(candidates, round=number) for number in range(8)]
        redrawn = {tuple(names(choose(as_rule("random"), one, Budget(count=1)))) for one in rounds}
        fixed = {tuple(names(choose(as_rule("random_fixed"), one, Budget(count=1)))) for one in rounds}
        seeds = [replace(candidates, seed=number) for number in range(8)]
        assert len(redrawn) > 1 and len(fixed) == 1
        assert len({tuple(names(choose(as_rule("random_fixed"), one, Budget(count=1)))) for one in seeds}) > 1
        assert as_rule("random")(candidates) == as_rule("random")(candidates)

    def test_first_last_and_all(self, candidates):
        assert names(choose(as_rule("first"), candidates, Budget(count=2))) == ["first", "second"]
        assert names(choose(as_rule("last"), candidates, Budget(count=2))) == ["hidden", "head"]
        body = replace(candidates, eligible=eligible_layers(candidates.layers, head_eligible=False))
        assert names(choose(as_rule("last"), body, Budget(count=1))) == ["hidden"]
        assert names(choose(as_rule("all"), body, Budget(count=1))) == ["first", "second", "hidden"]

    def test_layers_by_name(self, candidates):
        assert names(choose(as_rule(["hidden", "first"]), candidates, Budget(count=1))) == ["first", "hidden"]
        with pytest.raises(ValueError, match=r"names third, which cannot be chosen.*first, second, hidden, head"):
            choose(as_rule(["third"]), candidates, Budget(count=1))

    def test_a_registered_rule(self, candidates):
        @register_selection_rule("smallest, for a test")
        def smallest(candidates):
            return [-layer.nb_parameters for layer in candidates.layers]

        try:
            size = {layer.name: layer.nb_parameters for layer in candidates.layers}
            (chosen,) = choose(as_rule("smallest, for a test"), candidates, Budget(count=1)).layers
            assert chosen.name == min(size, key=size.get)
            assert choose(as_rule(smallest), candidates, Budget(count=1)).layers == [chosen]
            with pytest.raises(ValueError, match="already"):
                register_selection_rule("smallest, for a test")(lambda candidates: [])
        finally:
            del SELECTION_RULES["smallest, for a test"]

    @pytest.mark.parametrize("scores", [[1.0], [math.nan] * 4, [-math.inf] * 4])
    def test_useless_scores_are_refused(self, candidates, scores):
        with pytest.raises(ValueError, match=r"returned 1 scores for 4 layers|no layer that may be chosen has a score"):
            choose(lambda _: scores, candidates, Budget(count=1))

    def test_no_scored_layer_fits_the_budget(self, candidates):
        sizes = [layer.nb_parameters for layer in candidates.layers]
        scores = [-math.inf if size == min(sizes) else 1.0 for size in sizes]
        share = min(sizes) / sum(sizes)
        with pytest.raises(ValueError, match="`budget`: no layer that the rule scores fits into"):
            choose(lambda _: scores, candidates, Budget(parameter_share=share * 1.001))

    def test_bad_rules(self):
        with pytest.raises(ValueError, match=r"`selection` must be one of 'criticality', .* got 'worst'"):
            as_rule("worst")
        for wrong in (3, [], [1, 2]):
            with pytest.raises(TypeError, match="`selection` must be"):
                SelectionOptions(wrong)


class TestEligible:
    @pytest.fixture
    def layers(self, chain, data):
        return find_layers(chain, lambda size: chain(torch.tensor(data[0][:size])))

    def test_head_is_left_out_unless_asked_for(self, layers):
        assert names(eligible_layers(layers, head_eligible=False)) == ["first", "second", "hidden"]
        assert len(eligible_layers(layers, head_eligible=True)) == 4

    def test_frozen_layers_are_not_eligible(self, layers, chain):
        chain.second.requires_grad_(False)
        chain.hidden.bias.requires_grad_(False)
        assert names(eligible_layers(layers, head_eligible=False)) == ["first", "hidden"]
        chain.requires_grad_(False)
        with pytest.raises(ValueError, match="requires_grad=False"):
            eligible_layers(layers, head_eligible=True)
