"""Names in a checkpoint -> names in a model, as transformers maps them when it loads.

They differ by the prefix of the backbone (GPT-2 on the hub has `h.0...`, the model `transformer.h.0...`), by renamings
of old models, and where several stored tensors become one (fused experts) or one becomes several. What we rely on
beyond transformers' documented interface stands here, with canary tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rlhf_cli.errors import ModelError


@dataclass(frozen=True)
class NameMap:
    """stored: the model's name -> the checkpoint's, where the tensor is the same; converted: checkpoint names of
    tensors that transformers puts together or takes apart; made: the model's names that come of those;
    unknown: checkpoint names without a place in the model."""

    stored: dict[str, str]
    converted: list[str]
    made: frozenset[str]
    unknown: list[str]


class Resolver:
    """Maps names for one model, which may be without storage."""

    def __init__(self, shell: PreTrainedModel):
        self._shapes = shell.state_dict()
        self._prefix = shell.base_model_prefix
        transforms = get_model_conversion_mapping(shell)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def __contains__(self, name: str) -> bool:
        """Whether the model has a tensor of this name."""
        return name in self._shapes

    def model_name(self, name: str) -> tuple[str, bool]:
        """(the model's name of a stored tensor, whether it has to be converted). The model may not know that name."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._shapes)
        if renamed not in self._shapes and name in self._shapes:  # transformers' second try, without renamings
            return name, False
        return renamed, pattern is not None

    def map(self, names: Iterable[str]) -> NameMap:
        """Where the tensors of a checkpoint belong. Raises ModelError when two belong to one place."""
        stored: dict[str, str] = {}
        converted: list[str] = []
        made: set[str] = set()
        unknown: list[str] = []
        for name in names:
            model_name, is_converted = self.model_name(name)
            parts = self._made_of(name) if is_converted else {model_name} & self._shapes.keys()
            if not parts:
                unknown.append(name)
            elif is_converted:
                converted.append(name)
                made |= parts
            elif model_name in stored:
                raise ModelError(
                    f"merge.base: holds {model_name} twice, as {stored[model_name]} and {name}; its files are mixed up"
                )
            else:
                stored[model_name] = name
        return NameMap(stored, converted, frozenset(made), unknown)

    def file_name(self, model_name: str, stored_name: str | None) -> str:
        """The name in the merged model's files: the base's, which other tools know, unless it lacked the prefix."""
        plain = None
        if stored_name is not None:
            plain, _ = rename_source_key(stored_name, self._renamings, self._converters)
        name = stored_name if stored_name is not None and plain == model_name else model_name
        if self.model_name(name) != (model_name, False):
            raise ModelError(
                f"merge.base: transformers would not find {model_name} again after the merge; merge with PEFT"
            )
        return name

    def _made_of(self, name: str) -> set[str]:
        """All names of the model that a converted tensor has a part in."""
        first, _ = self.model_name(name)
        names = {first}
        for converter in self._converters:
            lead = converter.target_patterns[0]
            if lead in first:
                names |= {first.replace(lead, other) for other in converter.target_patterns[1:]}
        return names & self._shapes.keys()
