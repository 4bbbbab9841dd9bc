"""What a training run will need of its GPUs, computed before there are any.

``arguments`` lets Megatron check the flags, ``stages`` builds the pipeline stages on the meta
device, ``activations``, ``memory`` and ``cost`` turn their sizes into bytes and seconds,
``layouts`` looks for the nearest layout that works, and ``page`` writes it all down.
"""
