"""The sampling engine under the model families: a decoder, its state, and the head that scores image tokens."""
