"""A template for ms-swift that adds nothing to a message: --external_plugins grape_swift.py --template grape

Rows of the export hold whole sequences of tokens. Needs nothing of the service that wrote this file.
"""

from swift.template import TemplateMeta, register_template

register_template(TemplateMeta("grape", prefix=[], prompt=["{{QUERY}}"], chat_sep=[], suffix=[]), exist_ok=True)
