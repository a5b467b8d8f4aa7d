"""The SAE formats of other projects: each is read into, and written from, the one SAE of `saes`.

    reading.read_peer      a folder or a file -> an SAE that computes what its maker's code computes
    writing.write_peer     an SAE -> a folder that the other project's code loads
    delphi, neuronpedia    what an SAE says of a store, for other projects' explainers and browser

A module a format (`sae_lens`, `sparsify`, `dictionary_learning`, `openai`, `sdxl_unbox`,
`top_afa`) says in its docstring what the files hold and which formula they stand for. None of the
other projects is imported. What a format cannot say is never dropped in silence: it is refused with
advice, or it is a note that goes to the person and into the metadata.
"""
