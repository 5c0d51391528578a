"""Names of a chain's stages: those of the first round, and of the later ones, which have names of their own."""

from __future__ import annotations

from pathlib import Path

CHAIN = ("tokenizer", "pretrain", "sft", "preferences", "reward", "ppo", "evaluation")
ROUND = ("preferences", "reward", "ppo")  # what each further round of a chain does again


def stages_of(rounds: int) -> list[str]:
    """The stages of a chain in order; those of round r > 1 have a name of their own.

    >>> stages_of(2)[3:]
    ['preferences', 'reward', 'ppo', 'preferences-2', 'reward-2', 'ppo-2', 'evaluation']
    """
    again = [in_round(name, number) for number in range(2, rounds + 1) for name in ROUND]
    return [*CHAIN[:-1], *again, CHAIN[-1]]


def in_round(recipe: str, number: int) -> str:
    """The stage of a recipe in a round of a chain, and its folder: `reward`, `reward-2`, `reward-3`, ..."""
    return recipe if number == 1 else f"{recipe}-{number}"


def recipe_of(stage: str) -> tuple[str, int]:
    """The recipe of a stage and the number of its round.

    >>> recipe_of("reward-2"), recipe_of("sft")
    (('reward', 2), ('sft', 1))
    """
    recipe, _, number = stage.partition("-")
    return recipe, int(number) if number.isdigit() else 1


def rounds_of(run: Path) -> int:
    """How many rounds a run directory has folders of."""
    found = [recipe_of(path.name) for path in run.glob("*-*") if path.is_dir()]
    return max((number for recipe, number in found if recipe in ROUND), default=1)
