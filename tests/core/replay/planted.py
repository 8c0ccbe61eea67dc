"""How planted bugs are registered, and hunted: small scenes exhaustively, large ones by random walks."""

from collections.abc import Callable

from tests.core.replay.explorer import explore, walk
from tests.core.replay.scenarios import CALM, LARGE, SCENES

Plant = Callable  # monkeypatch -> None


def into(mutants: dict[str, tuple[Plant, str]]) -> Callable[[str], Callable[[Plant], Plant]]:
    """A decorator that takes the scene that must find the bug."""

    def mutant(found_by: str) -> Callable[[Plant], Plant]:
        def register(plant: Plant) -> Plant:
            mutants[plant.__name__] = (plant, found_by)
            return plant

        return register

    return mutant


def hunt(scene: str) -> None:
    """Raises AssertionError when the scene finds something."""
    if scene in LARGE:
        walk(LARGE[scene], walks=120, length=160, calm=CALM.get(scene, 0.95))
    else:
        explored = explore(SCENES[scene], limit=1500)
        assert not explored.stuck, f"a run cannot end after {explored.stuck[0]}"
