"""Writing responses with two models: who writes which token, exactly reproducible."""
