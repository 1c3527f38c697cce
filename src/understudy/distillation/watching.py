"""What terms see of two networks: places to listen at, projectors built by a probe, tensors gathered in each step.

Used by the distiller where a term looks inside the networks, and by what keeps or checks what it would see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from understudy.distillation import layers
from understudy.distillation.hooks import Listener, Place
from understudy.distillation.inputs import Inputs, moved
from understudy.distillation.layers import Head, Layer
from understudy.distillation.projectors import Shapes
from understudy.distillation.terms import Depth, Input, Term
from understudy.errors import ConfigError

Heard = Mapping[Place, Tensor]
Given = Tensor | list[Tensor] | None
Values = Mapping[Input, Tensor | None]


class Spot(NamedTuple):
    """A layer of one network, and where its map is taken."""

    layer: Layer
    place: Place

    def map(self, heard: Heard) -> Tensor:
        """Return the map [batch, channels, side, side]."""
        return layers.as_map(heard[self.place], self.layer)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape without the batch."""
        return self.layer.channels, self.layer.side, self.layer.side


@dataclass(frozen=True)
class Watched:
    """A term and the pairs of layers that it compares, student's first."""

    term: Term
    pairs: tuple[tuple[Spot, Spot], ...]


class Network:
    """One of the two networks: its layers as a probe shows them, and what they give from now on.

    Args:
        network: from images to logits.
        example: images [2 or more, channels, height, width], or named tensors; they run through it once.
        role: "student" or "teacher", for errors.
    """

    def __init__(self, network: nn.Module, example: Inputs, role: str) -> None:
        first = next(network.parameters(), None)
        given = example if first is None else moved(example, first.device)
        self.layers = layers.trace(network, given)
        self._head = layers.head(network, given)
        self._role = role
        self._module: tuple[nn.Module, ...] = (network,)
        self._listener = Listener(network, [])

    @property
    def head(self) -> Head:
        """The final layer.

        Raises:
            ConfigError: none was found.
        """
        if self._head is None:
            raise ConfigError(
                f"The {self._role} has no final linear layer that yields its logits, so there is no embedding to "
                "compare. Choose a method that compares logits or feature maps."
            )
        return self._head

    @property
    def module(self) -> nn.Module | None:
        """The network itself; None once it was let go of."""
        return self._module[0] if self._module else None

    @property
    def linear(self) -> nn.Linear | None:
        """The final layer where it is a linear one."""
        return self._head.module if self._head and isinstance(self._head.module, nn.Linear) else None

    def spot(self, layer: Layer, *, before_activation: bool) -> Spot:
        """Return where the map of a layer is taken; its output where no activation ends it."""
        if before_activation and layer.activation:
            return Spot(layer, Place(layer.activation, before=True))
        return Spot(layer, Place(layer.name))

    def listen(self, places: Sequence[Place]) -> None:
        """Listen at places from now on, and nowhere else."""
        self._listener.remove()
        self._listener = Listener(self._module[0], places)

    def dismiss(self) -> None:
        """Listen no more, and let go of the network."""
        if self._module:
            self.listen([])
        self._module = ()

    def take(self) -> Heard:
        """Return what the network gave since the last call."""
        return self._listener.take()

    def embedding(self, heard: Heard) -> Tensor | None:
        """Return the embedding [batch, width] where it was listened to."""
        given = heard.get(Place(self._head.name, before=True)) if self._head else None
        return None if given is None else layers.embedding(given)


class Watch:
    """Both networks as the terms look at them.

    Args:
        student: any network from images to logits.
        teacher: likewise; None where no term takes anything of its inside.
        terms: those that look inside.
        example: images [2 or more, channels, height, width], or named tensors, for the probe.
        samples: training images, for terms that remember each of them.

    Raises:
        ConfigError: a layer that is not there, or networks that cannot be compared.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, terms: Sequence[Term], example: Inputs, samples: int
    ) -> None:
        _refuse_maps(terms, example)
        self.student = Network(student, example, "student")
        # a student that is compared with itself has its own layers for pairs
        self.teacher = Network(teacher if teacher is not None else student, example, "teacher")
        self.watched = {term.name: Watched(term, self._pairs(term)) for term in terms}
        self._samples = samples

    def listen(self) -> None:
        """Listen to both networks from now on, where a term takes something."""
        networks = self.student, self.teacher
        every = [
            [place for watched in self.watched.values() for place in _places(watched, network, side)]
            for side, network in enumerate(networks)
        ]
        for network, places in zip(networks, every, strict=True):  # only now: nothing is left behind by an error
            network.listen(places)

    def pause(self) -> None:
        """Listen to neither network, until `listen`."""
        self.student.listen([])
        self.teacher.listen([])

    def _pairs(self, term: Term) -> tuple[tuple[Spot, Spot], ...]:
        if not term.takes_maps:
            return ()
        pairs = [
            (layers.find(self.student.layers, one), layers.find(self.teacher.layers, other))
            for one, other in term.layers
        ] or layers.pair(layers.stages(self.student.layers), layers.stages(self.teacher.layers))
        if not pairs:
            raise ConfigError(
                f"The term '{term.name}' compares feature maps, and one of the networks has none. Choose a method "
                "that compares logits or embeddings; `understudy layers MODEL` lists what there is."
            )
        chosen = pairs if term.layers else _at_depth(pairs, term.depth)
        early = term.before_activation
        return tuple(
            (self.student.spot(one, before_activation=early), self.teacher.spot(other, before_activation=early))
            for one, other in chosen
        )

    def projectors(self) -> nn.ModuleDict:
        """Build the projectors of all terms; one for each pair of layers where a term takes single maps.

        Raises:
            ModelError: a term does not fit these networks.
        """
        built = nn.ModuleDict()
        for name, watched in self.watched.items():
            if watched.term.projector is not None:
                built[name] = nn.ModuleList(watched.term.projector(shapes) for shapes in self._shapes(watched))
        return built

    def _shapes(self, watched: Watched) -> list[Shapes]:
        heads = self._samples, self.student.linear, self.teacher.linear, self.student.module
        if not any("embedding" in name or "map" in name for name in watched.term.takes):
            return [Shapes((), (), *heads)]
        if not watched.term.takes_maps:
            return [Shapes(((self.student.head.width,),), ((self.teacher.head.width,),), *heads)]
        if "student_map" in watched.term.takes:
            return [Shapes((one.shape,), (other.shape,), *heads) for one, other in watched.pairs]
        ones, others = zip(*watched.pairs, strict=True)
        return [Shapes(tuple(one.shape for one in ones), tuple(other.shape for other in others), *heads)]

    def gather(self, term: Term, values: Values, student: Heard, teacher: Heard) -> list[list[Given]]:
        """Return what a term takes in this step; once for each pair of layers where it takes single maps.

        Args:
            term: one of those watched.
            values: all but the maps.
            student: what the student gave.
            teacher: what the teacher gave.
        """
        pairs = self.watched[term.name].pairs
        ones = [one.map(student) for one, _ in pairs]
        others = [other.map(teacher) for _, other in pairs] if term.runs_teacher else []
        if "student_map" in term.takes:
            maps = zip(ones, others, strict=True)
            return [_take(term, {**values, "student_map": one, "teacher_map": other}) for one, other in maps]
        return [_take(term, {**values, "student_maps": ones, "teacher_maps": others})]


def _refuse_maps(terms: Sequence[Term], example: Inputs) -> None:
    """Refuse to take what layers give for maps where the networks see no images, or images that are not square."""
    given = [example] if isinstance(example, Tensor) else list(example.values())
    images = [one for one in given if one.ndim == 4]
    name = next((term.name for term in terms if term.takes_maps), None)
    if name is not None and not images:
        raise ConfigError(
            f"The term '{name}' compares feature maps, and there are no images among the inputs. Choose a method that "
            "compares logits or embeddings."
        )
    if name is not None and images[0].shape[2] != images[0].shape[3]:
        height, width = images[0].shape[2:]
        raise ConfigError(
            f"The term '{name}' compares feature maps, whose layers are found on square images, and the example is of "
            f"{height} x {width} pixels. Give square images as the example, or choose a method that compares logits or "
            "embeddings."
        )


def _at_depth(pairs: list[tuple[Layer, Layer]], depth: Depth) -> list[tuple[Layer, Layer]]:
    if depth == "all":
        return pairs
    return [pairs[-1 if depth == "last" else (len(pairs) - 1) // 2]]


def _take(term: Term, seen: Mapping[Input, Given]) -> list[Given]:
    return [seen[name] for name in term.takes]


def _places(watched: Watched, network: Network, side: int) -> list[Place]:
    """Return where a term listens to one of the networks."""
    listens = side == 0 or watched.term.runs_teacher
    places = [pair[side].place for pair in watched.pairs if listens]
    wanted = ("student_embedding", "teacher_embedding")[side]
    return [*places, layers.place_of_embedding(network.head)] if wanted in watched.term.takes else places
