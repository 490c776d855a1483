"""Names that users write, for whoever has to know them before anything is loaded."""

# torch's optimizers that can be counted, by the names that users write
OPTIMIZERS = {name.lower(): name for name in (
    "SGD", "Adam", "AdamW", "Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop"
)}  # fmt: skip
