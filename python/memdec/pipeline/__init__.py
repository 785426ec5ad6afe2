"""From text to memory, a stage at a time: corpus, embed, search, train. Each reads one artefact and writes the next."""
