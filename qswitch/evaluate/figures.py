"""Which figures an evaluation can hold, what they are called, and which way is better. Cold."""

from __future__ import annotations

COLUMNS = {
    "rouge_l": "ROUGE-L",
    "rouge_l_teacher": "ROUGE-L to teacher",
    "kl_nats": "KL to teacher, nats/token",
    "top1_agreement": "top-1 agreement",
    "own_reverse_kl_nats": "KL from teacher on own text, nats/token",
}
"""Metric -> heading, of what stands in every table. ROUGE-L x 100, against the references and against the teacher's
response; KL(teacher || model) and agreement on the teacher's responses; KL(model || teacher) on the model's own."""
OWN_COLUMNS = {
    "own_reverse_kl_nats": "KL(model || teacher), nats/token",
    "own_jsd_bits": "JSD, bits/token",
    "own_log_ratio_nats": "log p(teacher) - log p(model), nats/token",
}
"""Metric -> heading, of the table about the model's own responses."""
OWN_TEXT_COLUMNS = {
    "own_length_ratio": "length / the teacher's",
    "own_ended_share": "ended",
    "own_repetition": "repeated 4-grams",
}
"""Metric -> heading, of what the model's own responses are like, as shares."""
METRICS = tuple(COLUMNS | OWN_COLUMNS | OWN_TEXT_COLUMNS)
LOWER_IS_BETTER = ("kl_nats", "own_reverse_kl_nats", "own_jsd_bits")
