"""Did the student get better: responses, scores with intervals, and what quantisation does to the teacher."""
