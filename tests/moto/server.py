"""S3, KMS and IAM on a free port of the loopback, for as long as standard input stays open.

moto does what AWS does, with a few gaps that matter here: its KMS encrypts and decrypts under keys that are disabled or
pending deletion, or whose policy denies it, answers AccessDeniedException for a ciphertext of another key, and for many bytes that are none. What it should answer is in the KMS
Developer Guide, "Key states of AWS KMS keys", and in the KMS API Reference, `Decrypt`, "Errors".
"""

import json
import sys
import uuid

from moto.core.exceptions import JsonRESTError
from moto.kms import models
from moto.kms.utils import _deserialize_ciphertext_blob
from moto.server import ThreadedMotoServer


class Refused(JsonRESTError):
    code = 400


def check_state(key):
    if key.key_state == "PendingDeletion":
        raise Refused("KMSInvalidStateException", f"{key.arn} is pending deletion.")
    if not key.enabled:
        raise Refused("DisabledException", f"{key.arn} is disabled.")


def check_policy(key, action):
    """Denials alone, for whoever asks: what a policy allows is left to IAM."""
    for statement in json.loads(key.policy)["Statement"]:
        if statement["Effect"] == "Deny" and statement["Action"] == action:
            raise Refused("AccessDeniedException", f"{action} on {key.arn} with an explicit deny in a resource-based policy")


def decrypt(self, ciphertext_blob, encryption_context, key_id=None):
    try:
        key_id_within = _deserialize_ciphertext_blob(ciphertext_blob).key_id
        uuid.UUID(key_id_within)
    except Exception:
        raise Refused("InvalidCiphertextException", "")
    key = self.keys.get(key_id_within)
    if key is not None:
        if key_id is not None and self.any_id_to_key_id(key_id) != key.id:
            raise Refused(
                "IncorrectKeyException",
                "The key ID in the request does not identify a CMK that can perform this operation.",
            )
        check_state(key)
        check_policy(key, "kms:Decrypt")
    return moto_decrypt(self, ciphertext_blob, encryption_context, key_id)


def encrypt(self, key_id, plaintext, encryption_context):
    check_state(self.keys[self.any_id_to_key_id(key_id)])
    return moto_encrypt(self, key_id, plaintext, encryption_context)


moto_decrypt, models.KmsBackend.decrypt = models.KmsBackend.decrypt, decrypt
moto_encrypt, models.KmsBackend.encrypt = models.KmsBackend.encrypt, encrypt

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
print(f"{host}:{port}", flush=True)
sys.stdin.read()
