"""IFEval (arXiv 2311.07911): whether a reply follows instructions that a program can check.

The checks are lm-eval's, from its task `ifeval`, with all that they import.
"""

import random
from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from evomerge.errors import TaskError
from evomerge.fitness.example import Example
from evomerge.fitness.graders.grader import Grader, named


class IfEval(Grader):
    """1 if a reply follows all instructions of its item: the prompt-level accuracy of the paper's
    section 2.2. Records have IFEval's fields: key, prompt, instruction_id_list and kwargs."""

    kind: Literal["ifeval"] = "ifeval"
    strict: bool = Field(
        True,
        description="false: an instruction counts as followed, too, where the reply follows it "
        "without its first line, its last line or its asterisks (the loose accuracy).",
    )

    def check(self) -> None:
        """See Grader."""
        for module in ("lm_eval", "nltk", "langdetect", "immutabledict"):
            if find_spec(module) is None:
                raise TaskError(
                    f"score: '{named(self)}' needs the library '{module}': "
                    "pip install 'evomerge[lm-eval]'"
                )
        import nltk

        try:
            # The checks would download it, when they are imported.
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            raise TaskError(
                f"score: '{named(self)}' counts sentences with data of NLTK that is not here: "
                "python -m nltk.downloader punkt_tab (offline: unpack punkt_tab.zip into "
                "nltk_data/tokenizers, in your home or where NLTK_DATA says)"
            ) from None

    @property
    def target_is_reply(self) -> bool:
        """See Grader."""
        return False

    def worth(self, reply: str, item: Example) -> float:
        """See Grader."""
        import langdetect
        from lm_eval.tasks.ifeval import utils

        langdetect.DetectorFactory.seed = 0  # else it draws its n-grams anew every time
        fields = ("key", "prompt", "instruction_id_list", "kwargs")
        asked = utils.InputExample(**{name: item.record[name] for name in fields})
        follows = (
            utils.test_instruction_following_strict
            if self.strict
            else utils.test_instruction_following_loose
        )
        state = random.getstate()
        try:
            random.seed(0)  # what a record leaves open is drawn, from the global generator
            return float(follows(asked, reply).follow_all_instructions)
        finally:
            random.setstate(state)
