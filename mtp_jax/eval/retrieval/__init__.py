"""Adaptive retrieval: passages are looked up only for the questions whose answers look uncertain (arXiv:2501.12835).

uncertainty   scores of an answer, from log-probabilities, entropies or sampled answers
scores        the scores by name
gate          when to retrieve, fitted on one score
asking        how a model is asked, and what that costs
adaptive      `adaptive_answer`: answer, score, gate, and a second answer if needed
corpus        a BM25 retriever over a directory of texts
both, table   gates measured on questions that were answered without and with passages
"""

from mtp_jax.eval.retrieval.adaptive import Adaptive as Adaptive
from mtp_jax.eval.retrieval.adaptive import adaptive_answer as adaptive_answer
from mtp_jax.eval.retrieval.asking import Asking as Asking
from mtp_jax.eval.retrieval.asking import Counts as Counts
from mtp_jax.eval.retrieval.corpus import bm25 as bm25
from mtp_jax.eval.retrieval.corpus import read_passages as read_passages
from mtp_jax.eval.retrieval.gate import Gate as Gate
from mtp_jax.eval.retrieval.gate import LogisticGate as LogisticGate
from mtp_jax.eval.retrieval.gate import ThresholdGate as ThresholdGate
from mtp_jax.eval.retrieval.gate import fit_logistic as fit_logistic
from mtp_jax.eval.retrieval.gate import fit_threshold as fit_threshold
from mtp_jax.eval.retrieval.gate import load_gate as load_gate
from mtp_jax.eval.retrieval.scores import SCORES as SCORES
from mtp_jax.eval.retrieval.scores import Evidence as Evidence
from mtp_jax.eval.retrieval.scores import Score as Score
