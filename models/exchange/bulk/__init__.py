"""Many millions of images of a bundle, as shards of a data set.

    plan → worker (formats) → storage, given out by run through processes or ray_tasks

A shard is a function of the bundle's version, the options and the shard's number, so it does not matter who makes it,
when, or how often. `run` gives the numbers of the shards that are missing to whoever makes shards: processes of this
machine, or Ray's tasks. What they make is whole before it has its name. A record of the finished shards with their
checksums is kept from the beginning; a second run makes only what is not in it, and a run with other options is
refused. `manifest.json`, written last, says that everything is there.
"""
