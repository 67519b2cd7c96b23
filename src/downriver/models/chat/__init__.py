"""Language models behind one interface: behind an API, in this process, or scripted for a test."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.models.chat.huggingface import HFChat as HFChat
    from downriver.models.chat.ledger import Ledger as Ledger
    from downriver.models.chat.ledger import SpendingLimit as SpendingLimit
    from downriver.models.chat.openai import OpenAIChat as OpenAIChat
    from downriver.models.chat.openai import ServiceError as ServiceError
    from downriver.models.chat.protocol import ChatModel as ChatModel
    from downriver.models.chat.protocol import Completion as Completion
    from downriver.models.chat.protocol import LogLikelihood as LogLikelihood
    from downriver.models.chat.protocol import Tokens as Tokens
    from downriver.models.chat.scripted import ScriptedChat as ScriptedChat

_HERE = "downriver.models.chat"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ChatModel": f"{_HERE}.protocol:ChatModel",
        "Completion": f"{_HERE}.protocol:Completion",
        "HFChat": f"{_HERE}.huggingface:HFChat",
        "Ledger": f"{_HERE}.ledger:Ledger",
        "LogLikelihood": f"{_HERE}.protocol:LogLikelihood",
        "OpenAIChat": f"{_HERE}.openai:OpenAIChat",
        "ScriptedChat": f"{_HERE}.scripted:ScriptedChat",
        "ServiceError": f"{_HERE}.openai:ServiceError",
        "SpendingLimit": f"{_HERE}.ledger:SpendingLimit",
        "Tokens": f"{_HERE}.protocol:Tokens",
    },
)
