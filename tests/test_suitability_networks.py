"""Methods that do not suit the networks or one another are refused or warned about; so are terms out of balance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from suitability_settings import SETTING, chosen, every_method, examine, network, pair, setting
from understudy.distillation import METHODS, Distiller, Term, methods
from understudy.distillation.balance import Share, shares
from understudy.errors import ConfigError, ModelError
from understudy.evaluate.suitability import examine_methods, findings, refuse

# --- the two networks ------------------------------------------------------------------------------------------------


class NoHead(nn.Module):
    """A network whose logits are means over the places of a map: there is no final layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 3, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.stage(images).mean((2, 3))


def no_maps() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 3))


def flat_head() -> nn.Sequential:
    """Return a network whose head takes all places of the last map, without a pooling."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))


@every_method
@pytest.mark.parametrize(
    "made", [lambda: network(8), NoHead, no_maps, flat_head, lambda: network(4, stages=1), lambda: network(classes=5)]
)
def test_what_cannot_be_built_is_refused_before(method: str, made: Callable[[], nn.Module]) -> None:
    for one, other in ((made, network), (network, made)):
        networks = pair(one(), other())
        found = examine(method, networks=networks)
        assert not any(module._forward_hooks for net in networks[:2] for module in net.modules())
        try:
            built = Distiller(networks.teacher, networks.student, method=method, example=networks.example, samples=9)
        except (ConfigError, ModelError):
            assert found[f"{method} networks"].severity == "refuse"
        else:
            assert not found
            built.release()


@pytest.mark.parametrize(
    ("method", "student", "text"),
    [
        ("rkd", NoHead(), "rkd does not fit these networks: the student has no final linear layer: take kd, or"),
        ("hint", no_maps(), "hint does not fit these networks: the student has no feature maps: take kd, or"),
        ("fsp", network(stages=1), "fsp does not fit these networks: this method compares how one stage becomes the"),
        ("cat_kd", flat_head(), "cat_kd does not fit these networks: the student's final layer takes 256 features"),
    ],
)
def test_why_they_do_not_fit(method: str, student: nn.Module, text: str) -> None:
    found = examine(method, networks=pair(student, network()))
    assert found[f"{method} networks"].text.startswith(text)


def test_layers_that_are_not_there() -> None:
    (found,) = examine_methods(chosen("hint", layers=(("0", "layer9"),)), setting(networks=pair(network(), network(4))))
    assert found.check == "hint networks"
    assert found.text.startswith("hint does not fit these networks: unknown feature map 'layer9'")


@every_method
def test_looking_changes_nothing(method: str) -> None:
    torch.manual_seed(0)
    networks = pair(network().train(), network(4).train())
    before = [value.clone() for one in networks[:2] for value in one.state_dict().values()]
    random_numbers = torch.get_rng_state()
    examine(method, networks=networks)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    after = [value for one in networks[:2] for value in one.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for module in (module for one in networks[:2] for module in one.modules()):
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@every_method
def test_the_teacher_that_runs_along_is_noted_but_no_warning(method: str) -> None:
    noted = [one for one in examine_methods(chosen(method), SETTING) if one.check == f"{method} teacher"]
    assert bool(noted) is any("teacher_map" in name for name in METHODS[method].takes)
    assert all(one.ok for one in noted)


# --- methods together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "checks"),
    [
        ("kd+dkd", {"kd in dkd"}),
        ("mlkd+kd", {"kd in mlkd"}),
        ("rkd+rkd_distance+rkd_angle", {"rkd_distance in rkd", "rkd_angle in rkd"}),
        ("kd+rkd", set()),
        ("rkd_distance+rkd_angle", set()),
        ("kd+lskd", set()),
    ],
)
def test_methods_that_hold_one_another(names: str, checks: set[str]) -> None:
    found = examine(names)
    assert set(found) == checks
    assert all(one.severity == "warn" for one in found.values())


@every_method
def test_the_final_layer_has_to_learn_from_something(method: str) -> None:
    objective = Distiller(
        network(), network(), method=method, ce_weight=0, example=torch.rand(4, 3, 16, 16), samples=9
    ).train()
    objective.advance(0.1)
    objective(torch.rand(4, 3, 16, 16), torch.arange(4) % 3, positions=torch.arange(4)).total.backward()
    learns = objective.student[-1].weight.grad is not None  # type: ignore[index,union-attr]
    assert set(examine(method, ce_weight=0.0)) == (set() if learns else {"final layer"})
    assert not examine(f"{method}+logit_mse" if method != "logit_mse" else method, ce_weight=0.0)


# --- refusal ---------------------------------------------------------------------------------------------------------


def test_without_a_method() -> None:
    assert examine_methods([], SETTING) == []


def test_refusal_and_force() -> None:
    refuse(examine_methods(chosen("dist"), setting(classes=2)), force=False)
    two = examine_methods(chosen("dkd"), setting(classes=2))
    with pytest.raises(ConfigError, match=r"take kd instead\. Use --force to go on anyway\.$"):
        refuse(two, force=False)
    refuse(two, force=True)


@pytest.mark.parametrize(
    ("method", "changes"), [("dkd", {"mixed": True}), ("hint", {"networks": pair(no_maps(), network())})]
)
def test_force_does_not_help_where_training_cannot_begin(method: str, changes: dict[str, object]) -> None:
    for force in (False, True):
        with pytest.raises(ConfigError) as error:
            refuse(examine_methods(chosen(method), setting(**changes)), force=force)
        assert "--force" not in str(error.value)


# --- shares of the gradient ------------------------------------------------------------------------------------------


def measured(**norms: float) -> list[Share]:
    total = sum(norms.values())
    return [Share(name, 1.0, 0.5, norm, norm / total if total else 0.0) for name, norm in norms.items()]


@pytest.mark.parametrize(
    ("norms", "warned"),
    [
        ({"ce": 1.0}, set()),
        ({"ce": 1.0, "kd": 1.0}, set()),
        ({"ce": 99.0, "kd": 1.0}, set()),
        ({"ce": 99.1, "kd": 0.9}, {"kd share"}),
        ({"ce": 0.9, "kd": 99.1}, {"kd share"}),
        ({"ce": 50.0, "kd": 49.5, "sp": 0.5}, {"sp share"}),
        ({"ce": 0.5, "kd": 50.0, "sp": 49.5}, {"ce share"}),
        ({"ce": 0.5, "kd": 99.2, "sp": 0.3}, {"kd share", "sp share"}),
        ({"one": 999.0, "other": 1.0}, {"other share"}),
        ({"ce": 1.0, "ab": 0.0}, {"ab share"}),
        ({"ce": 0.0, "ab": 0.0}, {"ce share", "ab share"}),
    ],
)
def test_who_is_out_of_balance(norms: dict[str, float], warned: set[str]) -> None:
    found = findings(measured(**norms))
    assert {one.check for one in found} == warned
    assert all(one.severity == "warn" and not one.ok for one in found)


def test_what_is_said_of_the_balance() -> None:
    (found,) = findings(measured(ce=1.0, kd=0.005))
    assert found.text == (
        "kd makes up 0.5 % of the gradient in the first steps, so that it hardly teaches: with 100 instead of 0.5 as "
        "its weight (200 times) it would have an equal share."
    )
    (found,) = findings(measured(ce=1.0, ab=0.0))
    assert found.text == "ab has no gradient in the first steps, which no weight mends: leave it out."
    (found,) = findings([Share("ce", 1.0, 1.0, 1.0, 0.5), Share("kd", 1.0, 1.0, float("nan"), float("nan"))])
    assert found.text.startswith("The gradient of kd is not a number")


def quiet_shares(weights: dict[str, float]) -> list[Share]:
    """Measure an objective of cross-entropy, kd and similarity with given weights; there is no dropout."""
    torch.manual_seed(0)
    teacher, student = network(8), network(4)
    losses_of = {"kd": METHODS["kd"], "sp": METHODS["sp"]}
    terms: list[Term] = [methods.label_term(weight=weights["ce"])]
    for name, method in losses_of.items():
        if name in weights:
            (usual,) = method.terms()
            terms += method.terms(weight=weights[name] / usual.weight)  # type: ignore[operator]
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    objective = Distiller(teacher, student, terms=terms, example=images)
    return shares(objective, [(images, {"labels": torch.arange(16) % 3})])


@pytest.mark.parametrize(
    "weights",
    [
        {"ce": 1.0, "kd": 1e-4},
        {"ce": 1e-4, "kd": 1.0},
        {"ce": 1.0, "sp": 1e-3},
        {"ce": 1.0, "kd": 1.0, "sp": 1e-3},
        {"ce": 1.0, "kd": 1e-4, "sp": 1e-3},
        {"ce": 1.0, "kd": 1e-4, "sp": 1e6},
    ],
)
def test_the_suggested_weight_gives_an_equal_share(weights: dict[str, float]) -> None:
    before = quiet_shares(weights)
    told = {one.check.split()[0]: one.text for one in findings(before)}
    assert told
    balanced = {name: float(text.split(": with ")[1].split()[0]) for name, text in told.items()}
    after = {one.name: one.share for one in quiet_shares(weights | balanced)}
    assert findings(quiet_shares(weights | balanced)) == []
    for name in balanced:
        assert after[name] == pytest.approx(1 / len(weights), rel=0.01)  # three digits of the weight are told
