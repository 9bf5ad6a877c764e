from hypothesis import settings

# No timing bars: a busy machine is not a fault of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
