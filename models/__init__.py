"""Tensors only: the frozen base LM, the nets that make gists, and how a document's windows run through them.

Nothing is imported here, so that `import models` stays cheap; take what you need from its module:

    model_files      resolve_model, ModelFiles          a model source -> local folder, digest, shape
    tokenizer        Tokenizer                          text <-> uint32 ids; needs no torch
    base_lm          BaseLM, choose_dtype               Hugging Face causal LMs behind one adapter
    adapter          SavedAdapter, fresh_adapter        LoRA on a BaseLM, off unless turned on
    kv_cache         KVCache                            what a BaseLM remembers between calls
    positions        Positions, global_positions        where entries stand, in half tokens
    gistnet          GistNet, GistOutput, build_gistnet 32 children -> m vectors and a routing key
    window_encoder   WindowEncoder                      document windows -> gists, bit for bit reproducible
    node_encoder     NodeEncoder                        children -> the nodes above them, just so
"""
