"""What is compared with what, each experiment by its name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """Arms of one question, each run with the same seeds."""

    question: str  # one sentence
    arms: dict[str, str]  # name -> flags of train.py, as one would type them; first: the baseline
    common: str = ""  # flags of all arms, as "--steps 40"; an arm's own flags win
    command: str = "train.py"  # an arm that begins with "-m MODULE" replaces it
    seeds: int = 8  # seeds 1..n
    at: tuple[int, ...] = (10,)  # steps of the table, besides the last one


EXPERIMENTS = {
    "layers": Experiment(
        "Does it help to train the policy of an internal layer first?",
        {
            "grpo": "--bupo-layer none",
            "bupo3": "--bupo-layer 3 --bupo-steps 15",
        },
    ),
}
