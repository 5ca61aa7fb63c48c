"""In which formats a model answers: classifiers of responses, and reports of their shares."""

from mtp_jax.eval.formats.classifiers import Classifier as Classifier
from mtp_jax.eval.formats.classifiers import classifier as classifier
from mtp_jax.eval.formats.report import FormatReport as FormatReport
from mtp_jax.eval.formats.report import format_report as format_report
