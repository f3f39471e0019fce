"""Chat templates, data in their form, and training on the answers only, under the names that Unsloth's users know.

Written from the public documentation of these functions; the templates are those of `jaxsloth.data.catalogue`.
"""

from jaxsloth.chat_templates.choose import CHAT_TEMPLATES, STANDARD, create_stopping_criteria, get_chat_template
from jaxsloth.chat_templates.responses import train_on_responses_only
from jaxsloth.chat_templates.sharegpt import standardize_data_formats, standardize_sharegpt, to_sharegpt

__all__ = [
    "CHAT_TEMPLATES",
    "STANDARD",
    "create_stopping_criteria",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]
