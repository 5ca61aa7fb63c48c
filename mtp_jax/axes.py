"""The glossary: every axis letter used in array names and einsums, and every logical axis name of a parameter.

An array of rank two or more ends in its shape: `x_BTD` is [batch, time, width]. The letters:

| letter | axis                                                                                   |
|--------|----------------------------------------------------------------------------------------|
| A      | gradient-accumulation micro-batches                                                    |
| B      | batch rows                                                                             |
| C      | tokens of one chunk of the loss                                                        |
| D      | model width                                                                            |
| E      | experts of a feed-forward layer                                                        |
| F      | feed-forward width                                                                     |
| G      | query heads per key/value head, N = K G                                                |
| H      | width of one attention head                                                            |
| I, O   | inputs and outputs of any matrix                                                       |
| J      | positions before a round; the round computes their cache entries again. Nodes of a tree |
| K      | key/value heads                                                                        |
| L      | layers of the trunk, where parameters are stacked                                      |
| M      | prediction heads; head m predicts token t+1+m, so head 0 is the ordinary language model |
| N      | query heads                                                                            |
| P      | drafted tokens of one round; P <= M-1 where heads draft                                 |
| Q      | query positions of one decoding forward: P+1 in a round, the prompt bucket in prefill  |
| S      | key positions, or slots of a cache                                                     |
| T      | positions of a training row                                                            |
| R      | rank of a LoRA update                                                                  |
| U      | several axes joined: M B T tokens of a loss, G T queries of a key/value head, 2 D of two states |
| V      | vocabulary                                                                             |
| W      | tokens of a soft target; most likely tokens; positions of a window; the P mask tokens of an anchor as keys |
| X      | chosen positions of a row or of Q, such as anchors (positions with mask tokens); steps of a tree; patches |
| Y      | mask tokens of a row; there are X P                                                    |
| Z      | tokens and mask tokens of a decoding forward, Q + Y                                    |
| e      | experts that a token uses, of E                                                        |
| s, t   | s: the first slots of S; t: a block of the T queries                                   |
| n      | blocks of queries                                                                      |
| v      | tokens of a draft vocabulary, of V                                                     |
| k      | states of width D that make up a patch of bytes; joined to one of width U              |
| h      | dimension pairs of an attention head that are rotated, H/2 or fewer                    |
"""

# Logical axes of parameters. The model uses only these names; `sharding.py` maps them to a mesh.
LAYERS = "layers"
EMBED = "embed"
VOCAB = "vocab"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
EXPERTS = "experts"

# Logical axes of activations and batches.
BATCH = "batch"
LENGTH = "length"
