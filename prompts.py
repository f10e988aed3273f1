"""The one prompt form that every condition and the training share: a one-shot completion that ends at the line break.

    head    an example about other people (and, where the text is shown, the header it stands under)
    text    the conversation, only in the conditions that show it
    tail    "Question: ... Answer:" - the same tokens in every condition

The parts are tokenised one by one, so that a question has the same tokens whether or not a text stands before it.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    example: str      # a solved example, without a trailing line break
    header: str       # what announces the text
    question: str     # with {question}; ends where the answer begins
    answer: str       # with {answer}; ends with the line break that stops decoding


FORMS = {
    "en": Form(
        example=("Conversation:\nOdalys: The choir meets in the boathouse now.\nBertil: Good. I painted my bicycle green.\n\n"
                 "Question: Where does the choir meet?\nAnswer: boathouse"),
        header="\n\nConversation:\n", question="\n\nQuestion: {question}\nAnswer:", answer=" {answer}\n"),
    "zh": Form(
        example=("对话：\n奥达：合唱团现在改在船屋碰头。\n贝提：好。我把自行车漆成绿色了。\n\n问题：合唱团在哪里碰头？\n答案：船屋"),
        header="\n\n对话：\n", question="\n\n问题：{question}\n答案：", answer="{answer}\n"),
}


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def start_ids(tokenizer) -> list[int]:
    """What the tokenizer puts before every text (Gemma's <bos>), or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []


def head_ids(tokenizer, lang: str, with_text: bool) -> list[int]:
    form = FORMS[lang]
    return start_ids(tokenizer) + encode(tokenizer, form.example + (form.header if with_text else ""))


def written_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text that is written on its own; inside a prompt its tokens are the same without the start."""
    return start_ids(tokenizer) + encode(tokenizer, text)


def tail_ids(tokenizer, lang: str, question: str) -> list[int]:
    return encode(tokenizer, FORMS[lang].question.format(question=question))


def answer_ids(tokenizer, lang: str, answer: str) -> list[int]:
    """The gold answer as the model should say it, line break included."""
    return encode(tokenizer, FORMS[lang].answer.format(answer=answer))


def with_distractor(sample: dict) -> str:
    return sample["conversation"] + "\n\n" + sample["distractor"]
