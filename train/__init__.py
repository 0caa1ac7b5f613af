import flux2  # noqa: F401  before PEFT is imported, which it keeps from warning of what nobody needs
