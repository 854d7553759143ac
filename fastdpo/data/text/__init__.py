"""Read what a dataset row says, as text or as messages, and turn it into token ids."""
