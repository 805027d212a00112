"""Chat rows: the fields of a row -> a conversation -> its rendering by the chat template -> token ids and loss mask."""

from ndtrain.data.chat.conversation import FIELDS, ROLES
from ndtrain.data.chat.masks import ChatEncoder
from ndtrain.data.chat.template import BUILT_IN, ChatTemplate, chat_template

__all__ = ["BUILT_IN", "FIELDS", "ROLES", "ChatEncoder", "ChatTemplate", "chat_template"]
