"""S3, KMS and IAM on a free port of the loopback interface. The server ends when its standard input closes.

moto behaves as AWS does, with gaps that matter here. Its KMS encrypts and decrypts under keys that are disabled or
pending deletion, or whose policy denies it. It answers AccessDeniedException for a ciphertext of another key, and for
many bytes that are not a ciphertext. It cannot decrypt what a multi-Region key encrypted. This server closes these gaps. The right answers are in the KMS Developer Guide,
"Key states of AWS KMS keys", and in the KMS API Reference, `Decrypt`, "Errors".

Where requests are checked, moto looks only at actions. This server also looks at resources and conditions, at the policies
of keys and buckets, and at who asks, as the IAM User Guide says under "Policy evaluation logic" and the KMS Developer Guide
under "Key policies in AWS KMS". A part of a policy that it does not know is an error.
"""

import base64
import fnmatch
import json
import sys
import uuid

from moto.core.exceptions import JsonRESTError
from moto.iam import access_control
from moto.kms import models
from moto.kms.responses import KmsResponse
from moto.kms.utils import _deserialize_ciphertext_blob
from moto.s3.models import FakeBucket, s3_backends
from moto.server import ThreadedMotoServer


class Refused(JsonRESTError):
    code = 400


def check_state(key):
    if key.key_state == "PendingDeletion":
        raise Refused("KMSInvalidStateException", f"{key.arn} is pending deletion.")
    if not key.enabled:
        raise Refused("DisabledException", f"{key.arn} is disabled.")


def check_policy(key, action):
    """Checks only what the policy denies, for every caller. IAM checks what is allowed."""
    for statement in document(key.policy)["Statement"]:
        if statement["Effect"] == "Deny" and statement["Action"] == action:
            raise Refused("AccessDeniedException", f"{action} on {key.arn} with an explicit deny in a resource-based policy")


def decrypt(self, ciphertext_blob, encryption_context, key_id=None):
    try:
        key_id_within = _deserialize_ciphertext_blob(ciphertext_blob).key_id
        uuid.UUID(key_id_within.removeprefix("mrk-"))
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


def generate_key_id(multi_region=False):
    """As long as any other key's id. moto's are longer, and do not fit into its ciphertexts."""
    return f"mrk-{uuid.uuid4().hex}" if multi_region else str(uuid.uuid4())


def check_key_id(self, key_id):
    if not key_id.startswith("mrk-"):
        moto_check_key_id(self, key_id)
    elif key_id not in self.kms_backend.keys:
        raise Refused("NotFoundException", f"Key {key_id} does not exist")


models.generate_key_id = generate_key_id
moto_check_key_id, KmsResponse._validate_cmk_id = KmsResponse._validate_cmk_id, check_key_id
moto_decrypt, models.KmsBackend.decrypt = models.KmsBackend.decrypt, decrypt
moto_encrypt, models.KmsBackend.encrypt = models.KmsBackend.encrypt, encrypt



def document(policy):
    """A template's policy is not text."""
    return policy if isinstance(policy, dict) else json.loads(policy)


def listed(value):
    return value if isinstance(value, list) else [value]


def meets(condition, context):
    for operator, expected in condition.items():
        for name, values in expected.items():
            values = listed(values)
            if operator == "Null":
                holds = (name not in context) == (values == ["true"])
            elif operator in ("StringEquals", "Bool"):
                holds = context.get(name) in values
            else:
                raise NotImplementedError(operator)
            if not holds:
                return False
    return True


def matching(policy, effect, action, resource, context):
    """Returns the statements with this effect that match the request, for any caller."""
    for statement in listed(document(policy)["Statement"]):
        unknown = statement.keys() - {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert not unknown, unknown
        if (
            statement["Effect"] == effect
            and any(fnmatch.fnmatchcase(action, pattern) for pattern in listed(statement["Action"]))
            and any(fnmatch.fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
            and meets(statement.get("Condition", {}), context)
        ):
            yield statement


def names(statement, principals):
    principal = statement["Principal"]
    return principal == "*" or any(one in principals or one == "*" for one in listed(principal["AWS"]))


def made_by_s3(request, action, resource):
    """Returns the other requests that S3 makes for the caller: each an action and a resource."""
    headers = {name.lower(): value for name, value in dict(request._headers).items()}
    if action == "s3:PutObject":
        if headers.get("x-amz-tagging"):
            yield "s3:PutObjectTagging", resource
        if key := headers.get("x-amz-server-side-encryption-aws-kms-key-id"):
            yield "kms:GenerateDataKey", key
    elif action == "s3:GetObject":
        name, _, key = resource.split(":::")[1].partition("/")
        bucket = s3_backends[request.account_id]["aws"].buckets.get(name)
        stored = bucket.keys.get(key) if bucket else None
        if stored is not None and stored.kms_key_id:
            yield "kms:Decrypt", stored.kms_key_id


def is_permitted(request, resource):
    action = {"s3:HeadObject": "s3:GetObject"}.get(request._action, request._action)
    caller, account = request._access_key, request.account_id
    identity = [access_control.IAMPolicy(policy)._policy_json for policy in caller.collect_policies()]
    root, principals = f"arn:aws:iam::{account}:root", {caller.arn}
    if ":assumed-role/" in caller.arn:
        principals.add(f"arn:aws:iam::{account}:role/{caller.arn.split('/')[1]}")
    # The tests speak HTTP with this server, and TLS with AWS.
    context, of_resource = {"aws:SecureTransport": "true"}, None
    if action.startswith("kms:"):
        asked = json.loads(request._body or b"{}")
        backend = models.kms_backends[account][request._region]
        key_id = asked.get("KeyId")
        if key_id and "alias/" in key_id:
            context["kms:RequestAlias"] = key_id[key_id.index("alias/") :]
        for name, value in (asked.get("EncryptionContext") or {}).items():
            context[f"kms:EncryptionContext:{name}"] = value
        if not key_id and "CiphertextBlob" in asked:
            key_id = _deserialize_ciphertext_blob(base64.b64decode(asked["CiphertextBlob"])).key_id
        key = backend.keys.get(backend.any_id_to_key_id(key_id)) if key_id else None
        if key is not None:
            resource, of_resource = key.arn, key.policy
    elif action.startswith("s3:"):
        name = resource.split(":::")[1].split("/")[0]
        bucket = s3_backends[account]["aws"].buckets.get(name)
        of_resource = bucket.policy if bucket else None
    request_is = (action, resource, context)
    return is_allowed(identity, principals, root, of_resource, *request_is) and all(
        is_allowed(identity, principals, root, *of_other(request, *other)) for other in made_by_s3(request, action, resource)
    )


def of_other(request, action, resource):
    """Returns the policy of the resource, the action, the resource and the context of a request that S3 makes."""
    account = request.account_id
    if action.startswith("s3:"):
        name = resource.split(":::")[1].split("/")[0]
        bucket = s3_backends[account]["aws"].buckets.get(name)
        return bucket.policy if bucket else None, action, resource, {"aws:SecureTransport": "true"}
    key = models.kms_backends[account][request._region].keys[resource.split("/")[-1]]
    return key.policy, action, key.arn, {"kms:ViaService": f"s3.{request._region}.amazonaws.com"}


def is_allowed(identity, principals, root, of_resource, *request_is):
    action = request_is[0]
    by_identity = [policy for policy in identity if any(matching(policy, "Allow", *request_is))]
    if any(any(matching(policy, "Deny", *request_is)) for policy in identity):
        return False
    if of_resource is None:
        return bool(by_identity)
    if any(names(statement, principals) for statement in matching(of_resource, "Deny", *request_is)):
        return False
    allowing = list(matching(of_resource, "Allow", *request_is))
    if any(names(statement, principals) for statement in allowing):
        return True
    # A key's policy must let IAM policies count. A bucket's need not.
    counts = action.startswith("s3:") or any(names(statement, {root}) for statement in allowing)
    return bool(by_identity) and counts


def check_action_permitted(self, resource):
    if self._action != "sts:GetCallerIdentity" and not is_permitted(self, resource):
        self._raise_access_denied()


access_control.IAMRequestBase.check_action_permitted = check_action_permitted
# moto takes a condition that it cannot check for a denial.
FakeBucket.get_permission = lambda self, action, resource: access_control.PermissionResult.NEUTRAL

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
print(f"{host}:{port}", flush=True)
sys.stdin.read()
