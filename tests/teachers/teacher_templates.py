"""Chat templates in Jinja with the special tokens of each family.

A message's content is a string or a list of items of the types "text", "image" and "video".
"""

from __future__ import annotations


def items(image: str, video: str = "") -> str:
    """The part that writes one message's content, with the family's marks of image and video."""
    video_branch = f"{{% elif item.type == 'video' %}}{video}" if video else ""
    return (
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for item in message.content %}"
        f"{{% if item.type == 'image' %}}{image}{video_branch}"
        "{% elif item.type == 'text' %}{{ item.text }}{% endif %}"
        "{% endfor %}{% endif %}"
    )


def chatml(image: str, video: str = "") -> str:
    """ChatML: `<|im_start|>role`, a line feed, the content, `<|im_end|>` and a line feed."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        + items(image, video)
        + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


CHATML_TEXT = chatml(image="")
QWEN_VL = chatml(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
)
INTERNVL = chatml(image="<IMG_CONTEXT>\n", video="<video>\n")
LLAVA_ONEVISION = chatml(image="<image>\n", video="<video>\n")
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content is not string and message.content[0].type == 'image' %}:"
    "{% else %}: {% endif %}"
    + items("<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MISTRAL = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'user' %}[INST]" + items("[IMG]") + "[/INST]"
    "{% elif message.role == 'system' %}[SYSTEM_PROMPT]" + items("[IMG]") + "[/SYSTEM_PROMPT]"
    "{% else %}" + items("[IMG]") + "</s>{% endif %}{% endfor %}"
)
GEMMA3 = (
    "<bos>{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    + items("<start_of_image>")
    + "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The only template here that marks answers, so that both ways to an answer mask are covered.
LLAMA3 = (
    "<|begin_of_text|>{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.role == 'assistant' %}{% generation %}"
    + items("")
    + "<|eot_id|>{% endgeneration %}{% else %}"
    + items("")
    + "<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
