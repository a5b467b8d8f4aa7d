"""The adapter for causal language models of the Hugging Face library.

A `LanguageModel` knows where each site's tensor passes by (`hook_point`), how it is laid out
(`read`, `write`: always `[b, t, d]` outside), and how to run. Nothing else in the project looks
inside a transformers model. Architectures differ only in names, which `BLOCK_NAMES` lists as data.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probe.adapters import (
    ForwardStopped,
    HookSide,
    Moment,
    floats_of,
    module_at,
    with_floats,
)
from probe.errors import UserError
from probe.sites import LAYER_KINDS, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNames:
    """Where an architecture keeps its parts: dotted paths, a block's own relative to the block."""

    blocks: str
    """The list of blocks."""
    final_norm: str
    """The norm between the last block and the unembedding."""
    attention: str
    """The module whose output attention adds to the stream."""
    attention_out: str
    """A block's attention output projection: its input is the heads' outputs, concatenated."""
    mlp: str
    """The module whose output the MLP adds to the stream."""
    mlp_down: str
    """A block's last MLP projection: its input is the MLP's hidden units."""


BLOCK_NAMES = (
    BlockNames(
        blocks="model.layers",
        final_norm="model.norm",
        attention="post_attention_layernorm",
        attention_out="self_attn.o_proj",
        mlp="post_feedforward_layernorm",
        mlp_down="mlp.down_proj",
    ),
    BlockNames(
        blocks="model.layers",
        final_norm="model.norm",
        attention="self_attn",
        attention_out="self_attn.o_proj",
        mlp="mlp",
        mlp_down="mlp.down_proj",
    ),
    BlockNames(
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_out="attn.c_proj",
        mlp="mlp",
        mlp_down="mlp.c_proj",
    ),
    BlockNames(
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        attention_out="attention.dense",
        mlp="mlp",
        mlp_down="mlp.dense_4h_to_h",
    ),
)
"""Models that normalise before adding (Gemma 2 and 3, OLMo 2 and 3); Llama and its many relatives
(Mistral, Qwen, SmolLM); GPT-2; GPT-NeoX (Pythia). The first that fits is taken."""


class LanguageModel:
    """A causal language model with named sites."""

    def __init__(
        self,
        spec: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        random_weights: int | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            spec: the name it was asked for by.
            model: a causal language model; put into evaluation mode.
            tokenizer: its tokenizer.
            random_weights: the seed, where the weights are fresh random ones.
        """
        self.spec = spec
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.random_weights = random_weights
        self.names = find_block_names(model)
        self.n_layers = 0 if self.names is None else len(self._blocks())
        self.d_model: int = model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        return next(self.model.parameters()).dtype

    @property
    def net(self) -> nn.Module:
        """What runs once a pass: the whole model."""
        return self.model

    @property
    def in_last_pass(self) -> bool:
        """Every pass stands alone."""
        return True

    def moment(self, arguments: dict[str, Any]) -> Moment:
        """The position that the pass begins at: what its key-value cache holds already."""
        cache = arguments.get("past_key_values")
        return Moment(offset=0 if cache is None else int(cache.get_seq_length()))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens (end of text, turn markers, ...)."""
        return frozenset(self.tokenizer.all_special_ids)

    @property
    def separator_id(self) -> int:
        """The token put between documents: the tokenizer's end of text.

        Raises `UserError` for a tokenizer that has none.
        """
        separator = self.tokenizer.eos_token_id
        if not isinstance(separator, int):
            raise UserError(
                f"the tokenizer of {self.spec} has no end-of-text token to put between documents; "
                "set `eos_token` in its tokenizer_config.json."
            )
        return separator

    def _blocks(self) -> Any:
        assert self.names is not None
        return self.model.get_submodule(self.names.blocks)

    def sites(self) -> list[Site]:
        """Every layer site of the model, layer by layer."""
        layers = range(self.n_layers)
        return [Site(kind=kind, layer=layer) for layer in layers for kind in LAYER_KINDS]

    def hook_point(self, site: Site) -> tuple[nn.Module, HookSide]:
        """The module that `site`'s tensor passes by, and on which side of it.

        Raises `UserError` where the model has no such layer or module.
        """
        if site.kind == "module":
            return module_at(self.model, site, self.spec), site.tensor
        if site.kind == "block":
            raise UserError(
                f"site {site} is a block of an image model and {self.spec} is a language model; "
                "choose a layer site such as resid_post.0."
            )
        if self.names is None:
            raise UserError(
                f"{self.spec} is a {type(self.model).__name__}, whose layers are not known by "
                "name: use module:<dotted path> sites."
            )
        if site.layer is None or site.layer >= self.n_layers:
            raise UserError(
                f"site {site} is not in {self.spec}, whose layers are 0 to {self.n_layers - 1}."
            )
        block = self._blocks()[site.layer]
        places: dict[str, tuple[str, HookSide]] = {
            "resid_pre": ("", "input"),
            "resid_post": ("", "output"),
            "attn_out": (self.names.attention, "output"),
            "mlp_out": (self.names.mlp, "output"),
            "mlp_act": (self.names.mlp_down, "input"),
            "head_out": (self.names.attention_out, "input"),
        }
        relative, side = places[site.kind]
        return block.get_submodule(relative), side

    def read(self, site: Site, raw: Any) -> Float[Tensor, "*lead d"]:
        """The site's tensor out of what its module took or gave.

        Raises `UserError` where that is no tensor of floats.
        """
        return floats_of(site, raw)

    def write(self, site: Site, raw: Any, new: Tensor) -> Any:
        """What the module took or gave, with the site's tensor replaced by `new`."""
        return with_floats(raw, new)

    def try_out(self) -> None:
        """Run two tokens."""
        self.run(torch.zeros(1, 2, dtype=torch.long, device=self.device))

    def run(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"] | None:
        """Logits of a batch of token rows; None where a capture stopped the pass on purpose."""
        with contextlib.suppress(ForwardStopped):
            return self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return None

    def logit_matrix(self) -> Float[Tensor, "d v"] | None:
        """Direct effect of a residual direction on the logits: unembedding with the norm's gain.

        Column `j` is `g * W_U[:, j]` with `g` the final norm's gain, so `direction @ matrix` is the
        logit change that the direction causes up to the norm's positive scale. None where the model
        has no residual stream that we know by name.
        """
        head = self.model.get_output_embeddings()
        if self.names is None or head is None:
            return None
        norm = self.model.get_submodule(self.names.final_norm)
        # Zero mean and unit size: what the norm makes of it is its gain, however it keeps that.
        signs = torch.ones(self.d_model, device=self.device, dtype=self.dtype)
        signs[::2] = -1
        with torch.no_grad():
            gain = (norm(signs) - norm(-signs)).float() * signs / 2
        return (head.weight.detach().float() * gain).T

    def token_text(self) -> list[str]:
        """The text of every token of the vocabulary, by id, as it would be printed."""
        ids = range(self.model.config.get_text_config().vocab_size)
        return self.tokenizer.batch_decode([[i] for i in ids])


def find_block_names(model: PreTrainedModel) -> BlockNames | None:
    """The naming scheme that fits a model; None where none does."""
    for names in BLOCK_NAMES:
        with contextlib.suppress(AttributeError, IndexError, TypeError):
            block = model.get_submodule(names.blocks)[0]
            for path in (names.attention, names.attention_out, names.mlp, names.mlp_down):
                block.get_submodule(path)
            model.get_submodule(names.final_norm)
            return names
    return None
