"""`make demo`: a real Glance, a mount, and what they do together. Rule: nothing here is imported by cachefs, and
nothing that it makes outlives it.

    __main__   the order of things, and how it ends
    story      the acts: what is run, and what is said about it
    stage      what stands behind them: a folder, Glance, the daemon
    disk       the disk images, made on the spot
    terminal   how it looks
    endings    Ctrl-C and its relatives
"""
