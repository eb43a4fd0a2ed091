"""What models of text that may have a template of conversations share: prompts, as text and as ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seriatim.interop.chat import ChatTemplate
from seriatim.systems.text_system import TextSystem


class Conversing(TextSystem):
    """`chat`: its template of conversations, if it has one. `tokenizer` may be None: then it works on ids."""

    chat: ChatTemplate | None = None

    def prompt_of(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation ([{"role": "user", "content": "Hello"}, ...]) as the text of a prompt, special tokens in it,
        which the model's answer continues. Raises ValueError where there is no chat template, or it refuses."""
        if self.chat is None:
            raise ValueError(
                f"this {self.meta.key} has no chat template: it was not trained to converse, or its folder lacks "
                "chat_template.jinja or tokenizer_config.json; give it a text to continue"
            )
        return self.chat.render(messages)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The same as ids, special tokens as theirs and none added. Raises ValueError as `prompt_of`, and where there
        is no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer: give ids")
        prompt = self.prompt_of(messages)  # refuses models that do not converse, whatever their tokenizer
        return self.tokenizer.encode_templated(prompt)  # type: ignore[attr-defined]

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt as ids. Raises ValueError where there is no tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer: give ids")
        return self.tokenizer.encode(text)
