"""The widgets of the chat. They hold no inference logic; they post messages."""
