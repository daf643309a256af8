"""One file a kind of features; the file's name is what ``gcpo evaluate --diversity`` takes.

    features(pictures) -> Tensor (pictures, dim), whose cosines say how alike two pictures are
    label() -> str, what a report calls them

Both are looked for in a module of your own too: ``--diversity my_pkg.mine:features``; without `label` its name is used.
"""
