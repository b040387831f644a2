"""A few documents of each task, written for the tests: what lm-eval makes of them is in `tests/golden/lm_eval.json`.

Odd on purpose: white space at the ends, answers of one token and of many, choices that begin alike, Korean.
"""

from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """`config`: the task in lm-eval; `splits`: rows by split, the documents' split first."""

    task: str
    config: str
    splits: dict[str, Rows]
    num_fewshot: int = 0


def lettered(question: str, choices: str, answer: int) -> dict[str, Any]:
    return {"question": question, "choices": choices.split("|"), "answer": answer}


def korean(question: str, choices: str, answer: int) -> dict[str, Any]:
    return {"question": question, "answer": answer, **dict(zip("ABCD", choices.split("|"), strict=True))}


def blank(sentence: str, option1: str, option2: str, answer: str) -> dict[str, Any]:
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}


ANATOMY = {
    "test": [
        lettered("  Which organ pumps the blood? ", "The liver|The heart|The skin|The spleen", 1),
        lettered("How many chambers has a human heart?", "2|3|4|5", 2),
    ],
    "dev": [
        lettered("Which bone lies in the upper arm?", "The femur|The tibia|The humerus|The ulna", 2),
        lettered("What carries oxygen in the blood?\n", "Haemoglobin|Keratin|Insulin|Bile", 0),
        lettered("Where is vision processed?", "Heel|Occipital lobe|Pancreas|Colon", 1),
    ],
}
LAW = {
    "test": [
        korean("다음 중 대한민국의 수도는? ", "부산|대구|서울|광주", 3),
        korean("하루는 몇 시간인가?", "12시간|24시간|36시간|48시간", 2),
        korean("물의 화학식은?", "H2O|CO2|O2|NaCl", 1),
    ],
    "dev": [
        korean("1년은 몇 개월인가?", "10|11|12|13", 3),
        korean("태양이 뜨는 쪽은?", "동쪽|서쪽|남쪽|북쪽", 1),
        korean(" 가장 큰 수는?", "하나|둘|셋|넷", 4),
    ],
}
HELLASWAG = {
    "validation": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "A woman puts dough [substeps] into a tin.",
            "ctx_b": "she",
            "endings": [
                "puts the tin into the oven.",
                "throws the tin  out of the window.",
                "reads the dough a story [title] about bread.",
                "puts the tin on her head.",
            ],
            "label": "0",
        }
    ],
    "train": [],
}
ARC = {
    "test": [
        {
            "question": "What do plants need to make sugar?",
            "choices": {"text": ["moonlight", "sunlight", "salt"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {
            "question": "Which is a solid at room temperature?",
            "choices": {"text": ["oxygen", "water", "iron", "iron vapour"], "label": ["1", "2", "3", "4"]},
            "answerKey": "3",
        },
    ],
    "train": [],
}
WINOGRANDE = {
    "validation": [blank("Nora lent Ida her umbrella because _ had forgotten hers.", "Nora", "Ida", "2")],
    "train": [
        blank("The cup broke and the jug did not because the _ fell.", "cup", "jug", "1"),
        blank("Tim called Jon, but _ did not answer.", "Tim", "Jon", "2"),
        blank("The hat is larger than the glove, so the _ is smaller.", "hat", "glove", "2"),
    ],
}
PIQA = {
    "validation": [
        {"goal": "To dry wet shoes", "sol1": "stuff them with paper.", "sol2": "stuff them with soup.", "label": 0},
        {"goal": "To open a jar,", "sol1": "twist the glass in the oven", "sol2": "twist the lid", "label": 1},
    ],
    "train": [],
}
BOOLQ = {
    "validation": [
        {
            "passage": "Lakes -- A lake is a body of water that is surrounded by land.",
            "question": "is a lake surrounded by land",
            "label": 1,
        }
    ],
    "train": [],
}
PAGES = [
    " = A small village = \n\n The village lies by a river , and 1 @,@ 200 people live there . \n"
    ' It has a " town hall " ( built in 1901 ) . \n',
    "An old man's boat . \n" + "He rowed it over the lake every morning , and every evening he rowed it back . \n" * 4,
]

GOLDEN = [
    Golden(task="mmlu_anatomy", config="mmlu/default/mmlu_anatomy.yaml", splits=ANATOMY, num_fewshot=2),
    Golden(task="kmmlu_law", config="kmmlu/default/kmmlu_law.yaml", splits=LAW, num_fewshot=1),
    Golden(task="hellaswag", config="hellaswag/hellaswag.yaml", splits=HELLASWAG),
    Golden(task="arc_easy", config="arc/arc_easy.yaml", splits=ARC),
    Golden(task="winogrande", config="winogrande/default.yaml", splits=WINOGRANDE, num_fewshot=2),
    Golden(task="piqa", config="piqa/piqa.yaml", splits=PIQA),
    Golden(task="boolq", config="super_glue/boolq/default.yaml", splits=BOOLQ),
    Golden(
        task="wikitext",
        config="wikitext/wikitext.yaml",
        splits={"test": [{"page": page} for page in PAGES]},
    ),
]
