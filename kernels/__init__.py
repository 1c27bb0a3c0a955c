"""Custom ops, registered by importing: a file per op, or two of a kind, with formula, implementation, fake and kernels.

The kernels of a large op stand beside it, as ``cached_attention_triton``. What several ops share: ``cache_layout`` has
the table of the cache's parts, ``hierarchical`` its code, ``encode`` the kernels that write it, ``dense_tokens`` the
one that decodes it for prompts, ``pages`` what sparse attention chooses among, ``stretches_triton`` what kernels of
attention have in common, ``inline_asm`` device functions, ``current_device`` the guard around launches.
"""

# transformers looks for Hugging Face's library `kernels` and, where Python runs in the checkout, imports this folder
# under that name. Registering the ops a second time would leave handles to the first registration dangling.
if __name__ != "kernels":
    # Registers its op for CUDA.
    from . import cached_attention_triton as cached_attention_triton
    from .attention import attention
    from .cached_attention import cached_attention, cached_attention_reference
    from .called_module import called_module
    from .choose_pages import choose_pages
    from .cut_off import cut_off
    from .decoded_attention import decoded_attention
    from .expert_linear import expert_linear, int4_expert_linear
    from .flush import flush
    from .int4_linear import int4_fused_linear, int4_linear, int4_linear_to_norm
    from .linears import gated_linears, linears
    from .materialize import materialize
    from .prefill_attention import prefill_attention
    from .ranks import gather_ranks, reduce_ranks, reduce_ranks_to_norm
    from .repeated_layer import repeated_layer
    from .row_linear import row_linear
    from .scored_attention import scored_attention, scored_decoded_attention
    from .sparse_attention import sparse_attention
    from .tuning_attention import teaching_attention, tuning_attention

__all__ = [
    "attention",
    "cached_attention",
    "cached_attention_reference",
    "called_module",
    "choose_pages",
    "cut_off",
    "decoded_attention",
    "expert_linear",
    "flush",
    "gated_linears",
    "gather_ranks",
    "int4_expert_linear",
    "int4_fused_linear",
    "int4_linear",
    "int4_linear_to_norm",
    "linears",
    "materialize",
    "prefill_attention",
    "reduce_ranks",
    "reduce_ranks_to_norm",
    "repeated_layer",
    "row_linear",
    "scored_attention",
    "scored_decoded_attention",
    "sparse_attention",
    "teaching_attention",
    "tuning_attention",
]
