"""Did the student get better: scores with intervals, comparisons of methods, what quantisation does to the teacher."""
