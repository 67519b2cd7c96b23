"""Improve a prompt by critique: a language model reads what the prompt handles worst, says why, and writes others.

Reach for it as ``writer`` of ``UnsupervisedPromptLearner``, where prompts are to be sentences and not drawn n-grams.
The second version of Zhang et al.'s paper on unsupervised prompt learning (2025) optimises prompts by textual critique;
its wording is not public with the abstract, so the request here is ours.
"""

from collections.abc import Sequence

import numpy as np

from downriver.models.chat.protocol import ChatModel

SHOWN = 8
"""Texts that a critique reads."""
MARK = "Instruction:"
REQUEST = """A language model sorts texts into the classes {classes}. It is given an instruction, examples, and a text.
The instruction is now: {prompt}
On these texts it is least sure of the class that they seem to have:
{hardest}
Say in one sentence what the instruction lacks. Then write a better one, in one line that begins with «{mark}»."""


class Critique:
    """A prompt and how it changes: ``propose`` gives others beside the present one, ``learn`` keeps the best of them.

    >>> from downriver.models.chat import ScriptedChat
    >>> writer = ScriptedChat(lambda messages: "It does not say what matters. Instruction: judge the weather")
    >>> search = Critique(writer, ["good", "bad"], samples=2)
    >>> search.propose([("sun today", "good", 0.5)])
    ['', 'judge the weather']
    >>> search.learn(np.array([0.7, 0.2]))
    >>> search.best
    'judge the weather'
    """

    def __init__(self, writer: ChatModel, classes: Sequence[str], *, samples: int, seed: int = 0) -> None:
        self.writer, self.classes, self.samples, self.seed = writer, list(classes), samples, seed
        self.best = ""
        self._proposed = [""]

    def propose(self, hardest: Sequence[tuple[str, str, float]]) -> list[str]:
        """The present prompt and I − 1 new ones; ``hardest`` are texts, their labels and how probable these are."""
        shown = "\n".join(f"- {text} => {label} ({share:.2f})" for text, label, share in hardest[:SHOWN])
        request = REQUEST.format(
            classes=", ".join(self.classes), prompt=self.best or "(none yet)", hardest=shown, mark=MARK
        )
        [written] = self.writer.generate([request], max_tokens=200, temperature=1.0, n=self.samples - 1, seed=self.seed)
        self._proposed = [self.best, *(_instruction(answer.text) for answer in written)]
        return self._proposed

    def learn(self, losses: np.ndarray) -> None:
        """Keep the prompt of the lowest loss; of equal ones the present."""
        self.best = self._proposed[int(np.argmin(losses))]


def _instruction(text: str) -> str:
    """What stands behind the last mark, or the last line, in one line."""
    lines = [line.strip() for line in text.rpartition(MARK)[2].splitlines() if line.strip()]
    return lines[0 if MARK in text else -1].strip(' "«»') if lines else ""
