"""Train small.model, the SentencePiece model of the tests: `python make_tokenizer.py`.

It follows InternLM2's conventions (BPE, byte fallback, <unk> <s> </s> at 0 1 2, no normalisation)
at a size that can be committed. Golden ids in golden_prompts.json depend on it.
"""

import io
from pathlib import Path

import sentencepiece

MODEL = Path(__file__).with_name("small.model")

TEXT = """
You are looking at a picture of a street with two cars, a bicycle and a small dog.
What is shown in the picture? Please answer the question using a single word or phrase.
Answer with the option's letter from the given choices directly.
Is there a red car in the image? Please answer yes or no.
The quick brown fox jumps over the lazy dog, and the dog does not answer.
Describe the image in detail: what is in the front, what is at the back, and why?
A user asks, an assistant answers; the system text says who the assistant is.
How many people are in the second image, 1, 2, 3 or 10? Read the text on the sign.
def main(): print("hello, world")  # an example of code with brackets [] {} <>
图片中有一辆红色的汽车和一只小狗。
请直接回答选项字母。图中显示了什么？
你是一个有用无害的人工智能助手，请描述这张图片。
今天天气很好，我们一起去公园看大熊猫，还有很多人在那里。
""".strip().splitlines()


def train() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        character_coverage=0.995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    MODEL.write_bytes(train())
