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
    "own_reverse_kl_nats": COLUMNS["own_reverse_kl_nats"],
    "own_jsd_bits": "JSD on own text, bits/token",
    "own_log_ratio_nats": "log p(teacher) - log p(model) on own text, nats/token",
}
"""Metric -> heading, of the table about the model's own responses."""
OWN_TEXT_COLUMNS = {
    "own_length_ratio": "length / the teacher's",
    "own_ended_share": "ended",
    "own_repetition": "repeated 4-grams",
}
"""Metric -> heading, of what the model's own responses are like, as shares."""
BETTER = {
    "rouge_l": 1,
    "rouge_l_teacher": 1,
    "kl_nats": -1,
    "top1_agreement": 1,
    "own_reverse_kl_nats": -1,
    "own_jsd_bits": -1,
    "own_log_ratio_nats": 1,
}
"""Metric -> 1 where more is better, -1 where less is. What a text is like (OWN_TEXT_COLUMNS) is good where it is as the
teacher's, so it has no direction and cannot be tested."""
