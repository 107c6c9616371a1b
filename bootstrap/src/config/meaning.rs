//! Turns the raw configuration into its meaning: checks values, applies defaults, and checks which keys belong together.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use engine::key::VolumeKey;
use engine::layout::Striped;
use engine::luks::HashAlgorithm;
use engine::luks::plain::{PassphraseHash, PlainSegment};
use engine::raid::DEFAULT_CHUNK;
use engine::sector::{Lba512, SectorSize};
use toml::Spanned;

use super::metrics::{MetricsAddress, MetricsConfig};
use super::raw::{RawAttach, RawConfig, RawFilesystem, RawKey, RawKmsKeys, RawMetrics, RawSerials, RawSize, RawVolume};
use super::value::{self, KeyFile, KmsArn, S3Object, SecretLocation, ServerSideEncryption, StoredAs, VolumeName};
use super::{AttachConfig, AwsKeyConfig, BindConfig, Config, FilesystemConfig, KeyConfig, LimitsConfig, VolumeConfig};
use crate::attach::Method;
use crate::machine::selection::Selection;
use crate::volume::VolumeType;
use crate::volume::ephemeral::Lifetime;
use crate::volume::new_volume::Strength;
use crate::volume::plain::{PlainCipher, PlainVolume};

/// An error, and the range of bytes in the file that it concerns.
pub(super) struct Wrong {
    pub(super) span: Range<usize>,
    pub(super) message: String,
}

type Checked<T> = Result<T, Wrong>;

pub(super) fn config(raw: RawConfig, name_from_file: Option<VolumeName>) -> Checked<Config> {
    let name = match (&raw.volume.name, name_from_file) {
        (None, Some(name)) => name,
        (Some(name), _) => self::name(name)?,
        // The caller has reported this already. The empty span is the start of the file.
        (None, None) => return Err(Wrong { span: 0..0, message: "the volume has no name".to_owned() }),
    };
    let token_kind = raw.volume.kind.as_ref().map(|kind| {
        wrong(
            kind,
            "`object = \"token\"` keeps the secret in a token, which only a LUKS2 header has; use type = \"luks2\""
                .to_owned(),
        )
    });
    let random = raw.key.random == Some(true);
    let lifetime = lifetime(&raw)?;
    let (mut volume, mut key) = (volume(raw.volume)?, key(raw.key)?);
    volume.lifetime = lifetime;
    let is_token = matches!(&key, KeyConfig::Aws(aws) if aws.object == SecretLocation::Token);
    let strength =
        if random || is_token || lifetime == Lifetime::OfServer { Strength::Random } else { Strength::Guessable };
    if let (true, false, Some(wrong)) = (is_token, volume.kind == VolumeType::Luks2, token_kind) {
        return Err(wrong);
    }
    if let (VolumeType::Plain, None, KeyConfig::Aws(aws)) = (volume.kind, volume.plain.hash, &mut key) {
        aws.raw_key = Some(volume.plain.key_len);
    }
    Ok(Config {
        name,
        volume,
        key,
        strength,
        attach: attach(&raw.attach)?,
        filesystem: raw.filesystem.map(filesystem).transpose()?,
        metrics: raw.metrics.map(metrics).transpose()?,
    })
}

/// Returns how long the volume must be kept. A volume whose data may be lost says so under `[volume]`, whatever its key is.
fn lifetime(raw: &RawConfig) -> Checked<Lifetime> {
    let RawVolume { ephemeral, kind, max_kdf_memory, max_kdf_iterations, max_kdf_passes, .. } = &raw.volume;
    let is_type = |name: &str| kind.as_ref().filter(|kind| kind.get_ref().eq_ignore_ascii_case(name));
    let is_of_server = raw.key.source.get_ref() == "ephemeral";
    let Some(ephemeral) = ephemeral.as_ref().filter(|ephemeral| *ephemeral.get_ref()) else {
        if is_of_server {
            let message = "source = \"ephemeral\" needs `ephemeral = true` under [volume]: the key exists in memory only, so the \
                           volume is made anew whenever it comes up, and all data in it is lost";
            return Err(wrong(&raw.key.source, message.to_owned()));
        }
        return Ok(Lifetime::Lasting);
    };
    if is_type("plain").is_some() {
        let message = "a plain volume cannot be ephemeral: it has no header that shows to whom the disk belongs";
        return Err(wrong(ephemeral, message.to_owned()));
    }
    if !is_of_server {
        return Ok(Lifetime::OfDisks);
    }
    if let Some(kind) = is_type("luks1") {
        let message =
            "source = \"ephemeral\" makes a LUKS2 header without keyslots, which LUKS1 has not; leave `type` out";
        return Err(wrong(kind, message.to_owned()));
    }
    let spans = [
        max_kdf_memory.as_ref().map(Spanned::span),
        max_kdf_iterations.as_ref().map(Spanned::span),
        max_kdf_passes.as_ref().map(Spanned::span),
    ];
    if let Some(span) = spans.into_iter().flatten().next() {
        let message = "source = \"ephemeral\" has no keyslot, so no key is derived; leave this out".to_owned();
        return Err(Wrong { span, message });
    }
    Ok(Lifetime::OfServer)
}

fn name(name: &Spanned<String>) -> Checked<VolumeName> {
    VolumeName::new(name.get_ref()).ok_or_else(|| {
        wrong(
            name,
            format!(
                "`{}` is not a volume name: 1 to {} of A-Z a-z 0-9 . _ -, starting with a letter, a digit or _",
                name.get_ref(),
                VolumeName::MAX_LEN
            ),
        )
    })
}

fn volume(raw: RawVolume) -> Checked<VolumeConfig> {
    let devices = selection(raw.devices.as_ref(), raw.serial.as_ref())?;
    if let (Selection::InstanceStore | Selection::Serials { .. }, Some(size)) = (&devices, &raw.size) {
        return Err(wrong(size, "`size` is for a regular file; a disk is used as a whole".to_owned()));
    }
    let is_one_path = matches!(&devices, Selection::Paths(paths) if paths.len() == 1);
    if let (Selection::Paths(_), Some(size), false) = (&devices, &raw.size, is_one_path) {
        return Err(wrong(size, "`size` makes a single file; the disks or files of an array must be there".to_owned()));
    }
    if let (Some(chunk), true) = (&raw.chunk_size, is_one_path) {
        return Err(wrong(chunk, "`chunk-size` is for an array, and `devices` names a single disk".to_owned()));
    }
    let kind = raw.kind.as_ref().map_or(Ok(VolumeType::Luks2), volume_type)?;
    if let (VolumeType::Plain, Some(header)) = (kind, &raw.header) {
        return Err(wrong(header, "a plain volume has no header".to_owned()));
    }
    if let (Selection::Paths(disks), Some(header)) = (&devices, &raw.header)
        && disks.iter().any(|disk| disk == Path::new(header.get_ref()))
    {
        return Err(wrong(header, "`header` names the disk itself: leave it out if the header is there".to_owned()));
    }
    let sector_size = raw.sector_size.as_ref().map(|size| sector_size(size, kind)).transpose()?;
    Ok(VolumeConfig {
        devices,
        wait_for: raw.wait_for.as_ref().map_or(Ok(VolumeConfig::DEFAULT_WAIT_FOR), wait_for)?,
        size: raw.size.as_ref().map(size).transpose()?,
        kind,
        sector_size,
        // cryptsetup's default.
        plain: plain(&raw, kind, sector_size.unwrap_or(SectorSize::B512))?,
        header: raw.header.as_ref().map(absolute).transpose()?,
        chunk_size: raw.chunk_size.as_ref().map_or(Ok(DEFAULT_CHUNK), chunk_size)?,
        // It depends on the source of the key as well.
        lifetime: Lifetime::Lasting,
        limits: LimitsConfig {
            kdf_memory: raw.max_kdf_memory.as_ref().map(kdf_memory).transpose()?,
            kdf_iterations: raw.max_kdf_iterations.as_ref().map(|count| kdf_count(count, "iterations")).transpose()?,
            kdf_passes: raw.max_kdf_passes.as_ref().map(|count| kdf_count(count, "passes")).transpose()?,
        },
    })
}

/// Checks the parameters of a plain volume, which have the names of cryptsetup's options.
fn plain(raw: &RawVolume, kind: VolumeType, sector_size: SectorSize) -> Checked<PlainVolume> {
    let RawVolume { offset, skip, key_size, keyfile_size, hash, hash_key_file, iv_large_sectors, cipher, .. } = raw;
    if kind != VolumeType::Plain {
        only_for_plain("offset", offset.as_ref())?;
        only_for_plain("skip", skip.as_ref())?;
        only_for_plain("key-size", key_size.as_ref())?;
        only_for_plain("keyfile-size", keyfile_size.as_ref())?;
        only_for_plain("hash", hash.as_ref())?;
        only_for_plain("hash-key-file", hash_key_file.as_ref())?;
        only_for_plain("iv-large-sectors", iv_large_sectors.as_ref())?;
        only_for_plain("cipher", cipher.as_ref())?;
        return Ok(PlainVolume::default());
    }
    let number = |number: &Option<Spanned<u64>>| number.as_ref().map_or(0, |number| *number.get_ref());
    if let Some(skip) = skip.as_ref().filter(|skip| !skip.get_ref().is_multiple_of(sector_size.lba_step())) {
        let step = sector_size.lba_step();
        return Err(wrong(
            skip,
            format!("`skip` counts units of 512 bytes: with sectors of {sector_size} it must be a multiple of {step}"),
        ));
    }
    let key_len = match key_size {
        None => VolumeKey::AES_256,
        Some(bits) => match bits.get_ref() {
            512 => VolumeKey::AES_256,
            256 => VolumeKey::AES_128,
            other => {
                return Err(wrong(
                    bits,
                    format!("a key has 512 bits, or 256 for AES-128, with both halves counted; not {other}"),
                ));
            }
        },
    };
    let keyfile_size = keyfile_size.as_ref().map(|size| match usize::try_from(*size.get_ref()) {
        Ok(bytes @ 1..) => Ok(bytes),
        _ => Err(wrong(size, format!("`keyfile-size` counts bytes and must be at least 1, not {}", size.get_ref()))),
    });
    if let (Some(flag), None) = (hash_key_file, hash) {
        return Err(wrong(flag, "`hash-key-file` needs `hash`, which names the hash for the key file".to_owned()));
    }
    let hash = hash.as_ref().map(|hash| {
        PassphraseHash::from_name(hash.get_ref()).ok_or_else(|| {
            let names: Vec<_> = HashAlgorithm::ALL.iter().map(|hash| hash.name()).collect();
            wrong(hash, format!("`{}` is not a hash; the hashes are plain, {}", hash.get_ref(), names.join(", ")))
        })
    });
    Ok(PlainVolume {
        data: PlainSegment { offset: number(offset), size: None, skip: Lba512(number(skip)), sector_size },
        key_len,
        keyfile_size: keyfile_size.transpose()?,
        hash: hash.transpose()?,
        hash_key_file: hash_key_file.as_ref().is_some_and(|it| *it.get_ref()),
        iv_large_sectors: iv_large_sectors.as_ref().is_some_and(|it| *it.get_ref()),
        cipher: cipher.as_ref().map_or(Ok(PlainCipher::default()), |name| {
            PlainCipher::from_name(name.get_ref()).map_err(|e| wrong(name, e))
        })?,
    })
}

fn only_for_plain<T>(key: &str, value: Option<&Spanned<T>>) -> Checked<()> {
    match value {
        Some(value) => Err(wrong(value, format!("`{key}` needs type = \"plain\": for LUKS, the header stores it"))),
        None => Ok(()),
    }
}

/// Returns a size in KiB.
fn kdf_memory(size: &Spanned<RawSize>) -> Checked<u32> {
    let (text, bytes) = match size.get_ref() {
        RawSize::Bytes(bytes) => (bytes.to_string(), Some(*bytes)),
        RawSize::Text(text) => (text.clone(), value::parse_size(text)),
    };
    bytes.and_then(|bytes| u32::try_from(bytes / 1024).ok()).ok_or_else(|| {
        wrong(
            size,
            format!(
                "`{text}` is not an amount of memory for a key derivation: write a size such as \"8G\", at most 4095G"
            ),
        )
    })
}

fn kdf_count(count: &Spanned<u64>, of: &str) -> Checked<NonZeroU32> {
    let number = u32::try_from(*count.get_ref()).ok().and_then(NonZeroU32::new);
    number.ok_or_else(|| wrong(count, format!("{} {of}: 1 to {} are possible", count.get_ref(), u32::MAX)))
}

/// Returns which disks or files `devices` and `serial` select together.
fn selection(
    devices: Option<&Spanned<Vec<Spanned<String>>>>,
    serial: Option<&Spanned<RawSerials>>,
) -> Checked<Selection> {
    let named = devices.map(named).transpose()?;
    let Some(written) = serial else {
        return named.ok_or_else(|| Wrong {
            span: 0..0,
            message: "[volume] names no disk: write `devices`, such as devices = [\"instance-store\"], or `serial`"
                .to_owned(),
        });
    };
    let serials = serials(written)?;
    match &named {
        None | Some(Selection::InstanceStore | Selection::Serials { .. }) => {}
        Some(Selection::Paths(paths)) => {
            if let Some(path) = paths.iter().find(|path| !path.starts_with("/dev")) {
                let message = format!("{} is not in /dev, and only a disk has a serial number", path.display());
                return Err(wrong(written, message));
            }
            if let Some(path) = paths.iter().find(|path| is_partition(path)) {
                let message = format!(
                    "{} is a partition, and the disk with this serial number would be taken as a whole; for a partition, leave \
                     `serial` out and use its name in /dev/disk/by-partuuid",
                    path.display()
                );
                return Err(wrong(written, message));
            }
            if paths.len() != serials.len() {
                let message = format!(
                    "{} serial numbers for {} devices: write one for each, or leave `devices` out",
                    serials.len(),
                    paths.len()
                );
                return Err(wrong(written, message));
            }
        }
    }
    Ok(Selection::Serials { serials, instance_store: named == Some(Selection::InstanceStore) })
}

/// Returns what `devices` names.
fn named(devices: &Spanned<Vec<Spanned<String>>>) -> Checked<Selection> {
    let list = devices.get_ref();
    let is_store = |device: &Spanned<String>| device.get_ref() == "instance-store";
    if list.iter().any(is_store) {
        return match list.iter().find(|device| !is_store(device)).or(list.get(1)) {
            None => Ok(Selection::InstanceStore),
            Some(other) => Err(wrong(
                other,
                "\"instance-store\" stands for every instance-store disk: name nothing else".to_owned(),
            )),
        };
    }
    if list.is_empty() {
        return Err(wrong(devices, "name a disk or file, or \"instance-store\"".to_owned()));
    }
    for (index, device) in list.iter().enumerate() {
        if list[..index].iter().any(|other| other.get_ref() == device.get_ref()) {
            return Err(wrong(device, format!("`{}` twice: each disk of an array is named once", device.get_ref())));
        }
    }
    list.iter().map(absolute).collect::<Checked<_>>().map(Selection::Paths)
}

/// Checks the serial numbers.
fn serials(written: &Spanned<RawSerials>) -> Checked<Vec<String>> {
    let RawSerials(serials) = written.get_ref();
    if serials.is_empty() {
        return Err(wrong(
            written,
            "an empty list names no disk: write a serial number, as `nbdcrypt devices` shows it".to_owned(),
        ));
    }
    for (index, serial) in serials.iter().enumerate() {
        if serial.trim().is_empty() || serial.trim() != serial || serial.chars().any(char::is_control) {
            let message =
                format!("`{}` is not a serial number: write it as `nbdcrypt devices` shows it", serial.escape_debug());
            return Err(wrong(written, message));
        }
        if serials[..index].contains(serial) {
            return Err(wrong(written, format!("`{serial}` twice: each disk is named once")));
        }
    }
    Ok(serials.clone())
}

/// Returns whether this is the name of a partition, as the kernel and udev make them: the disk's name, and a number. The number
/// follows a `p` if the disk's name ends in a digit.
fn is_partition(path: &Path) -> bool {
    if path.starts_with("/dev/disk/by-partuuid") || path.starts_with("/dev/disk/by-partlabel") {
        return true;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let disk = name.trim_end_matches(|c: char| c.is_ascii_digit());
    if disk.len() == name.len() {
        return false;
    }
    let after_digit = disk.strip_suffix('p').is_some_and(|disk| disk.ends_with(|c: char| c.is_ascii_digit()));
    let after_letters = ["sd", "vd", "xvd", "hd"].iter().any(|kind| {
        let letters = disk.strip_prefix(kind);
        letters.is_some_and(|letters| !letters.is_empty() && letters.chars().all(|c| c.is_ascii_lowercase()))
    });
    let in_dev = path.parent() == Some(Path::new("/dev"));
    (in_dev && (after_digit || after_letters)) || disk.ends_with("-part")
}

fn wait_for(text: &Spanned<String>) -> Checked<Duration> {
    let wait = value::parse_duration(text.get_ref()).filter(|wait| *wait <= VolumeConfig::LONGEST_WAIT_FOR);
    wait.ok_or_else(|| {
        let longest = VolumeConfig::LONGEST_WAIT_FOR.as_secs() / 3600;
        wrong(text, format!("`{}` is not a time to wait; write \"0s\" to {longest}h, such as \"30s\"", text.get_ref()))
    })
}

/// Returns the number of bytes.
fn size_in_bytes(size: &Spanned<RawSize>) -> Checked<u64> {
    match size.get_ref() {
        RawSize::Bytes(bytes) => Ok(*bytes),
        RawSize::Text(text) => value::parse_size(text).ok_or_else(|| {
            wrong(
                size,
                format!("`{text}` is not a size: write digits and one of K, M, G, T (powers of 1024), as in \"2G\""),
            )
        }),
    }
}

fn size(size: &Spanned<RawSize>) -> Checked<u64> {
    let bytes = size_in_bytes(size)?;
    // 4096 is the largest sector size. So the file ends with a whole sector, for every volume type and sector size.
    if bytes == 0 || !bytes.is_multiple_of(SectorSize::B4096.bytes_u64()) {
        return Err(wrong(
            size,
            format!("a file of {}: the size must be a multiple of 4096, and not zero", engine::text::bytes(bytes)),
        ));
    }
    Ok(bytes)
}

fn chunk_size(size: &Spanned<RawSize>) -> Checked<u64> {
    let bytes = size_in_bytes(size)?;
    match bytes.is_power_of_two() && (Striped::MIN_CHUNK..=Striped::MAX_CHUNK).contains(&bytes) {
        true => Ok(bytes),
        false => Err(wrong(
            size,
            format!(
                "a chunk of {}: 4K, 8K and so on up to 1G are possible (powers of two)",
                engine::text::bytes(bytes)
            ),
        )),
    }
}

fn volume_type(kind: &Spanned<String>) -> Checked<VolumeType> {
    kind.get_ref().parse().map_err(|why| wrong(kind, why))
}

fn sector_size(size: &Spanned<u64>, kind: VolumeType) -> Checked<SectorSize> {
    let bytes = *size.get_ref();
    match (SectorSize::from_bytes(bytes), kind) {
        (None, _) => Err(wrong(size, format!("a sector can have 512, 1024, 2048, 4096 bytes, not {bytes}"))),
        (Some(sectors), VolumeType::Luks1) if sectors != SectorSize::B512 => {
            Err(wrong(size, "LUKS1 has sectors of 512 bytes only; leave `sector-size` out".to_owned()))
        }
        (Some(sectors), _) => Ok(sectors),
    }
}

fn key(raw: RawKey) -> Checked<KeyConfig> {
    match raw.source.get_ref().as_str() {
        "file" => file_key(&raw).map(KeyConfig::File),
        "aws" => aws_key(raw).map(KeyConfig::Aws),
        "ephemeral" => only_own_keys(&raw).map(|()| KeyConfig::Ephemeral),
        other => {
            Err(wrong(&raw.source, format!("`{other}` is not a key source; the sources are aws, file, ephemeral")))
        }
    }
}

/// Checks that no key of another source is there, for a source that is not AWS.
fn only_own_keys(raw: &RawKey) -> Checked<()> {
    // This pattern and the one in `aws_key` name every field of RawKey, so that no field is ignored silently.
    let RawKey {
        source,
        random,
        path,
        object,
        kms_key,
        encryption_context,
        sse,
        sse_kms_key_id,
        tags,
        region,
        s3_region,
        kms_region,
        profile,
        endpoint_url,
        s3_endpoint_url,
        kms_endpoint_url,
        retry_for,
    } = raw;
    let name = source.get_ref().as_str();
    if name == "ephemeral" {
        unused(name, "path", path.as_ref())?;
        if random.is_some() {
            return Err(wrong(
                source,
                "`random` is about a secret that you chose, and an ephemeral key is always random; leave it out"
                    .to_owned(),
            ));
        }
    }
    unused(name, "object", object.as_ref())?;
    unused(name, "kms-key", kms_key.as_ref())?;
    unused(name, "encryption-context", encryption_context.as_ref())?;
    unused(name, "sse", sse.as_ref())?;
    unused(name, "sse-kms-key-id", sse_kms_key_id.as_ref())?;
    unused(name, "tags", tags.as_ref())?;
    unused(name, "region", region.as_ref())?;
    unused(name, "s3-region", s3_region.as_ref())?;
    unused(name, "kms-region", kms_region.as_ref())?;
    unused(name, "profile", profile.as_ref())?;
    unused(name, "endpoint-url", endpoint_url.as_ref())?;
    unused(name, "s3-endpoint-url", s3_endpoint_url.as_ref())?;
    unused(name, "kms-endpoint-url", kms_endpoint_url.as_ref())?;
    unused(name, "retry-for", retry_for.as_ref())?;
    Ok(())
}

fn file_key(raw: &RawKey) -> Checked<KeyFile> {
    only_own_keys(raw)?;
    let RawKey { source, path, .. } = raw;
    let Some(path) = path else {
        return Err(wrong(source, "source = \"file\" needs `path = \"/the/key/file\"`".to_owned()));
    };
    if path.get_ref() == "-" { Ok(KeyFile::Stdin) } else { absolute(path).map(KeyFile::Path) }
}

fn aws_key(raw: RawKey) -> Checked<AwsKeyConfig> {
    unused("aws", "path", raw.path.as_ref())?;
    let Some(object) = &raw.object else {
        let message = "source = \"aws\" needs `object = \"s3://BUCKET/KEY\"`, or \"token\" for the volume's own header";
        return Err(wrong(&raw.source, message.to_owned()));
    };
    if object.get_ref() == "token" && raw.kms_key.is_none() {
        let message = "a token in the header needs `kms-key`: anyone who can write to the disk can replace the token, so the \
                       trusted key must be named here";
        return Err(wrong(object, message.to_owned()));
    }
    if object.get_ref() == "token" {
        only_for_objects("sse", raw.sse.as_ref())?;
        only_for_objects("sse-kms-key-id", raw.sse_kms_key_id.as_ref())?;
        only_for_objects("tags", raw.tags.as_ref())?;
    }
    let endpoint = raw.endpoint_url.as_ref().map(endpoint).transpose()?;
    let own = |url: Option<&Spanned<String>>| url.map(self::endpoint).transpose();
    Ok(AwsKeyConfig {
        object: match object.get_ref().as_str() {
            "token" => SecretLocation::Token,
            uri => S3Object::parse(uri)
                .ok_or_else(|| wrong(object, format!("`{uri}` is not an object; write s3://BUCKET/KEY, or token")))?
                .into(),
        },
        raw_key: None,
        kms_keys: raw.kms_key.map_or(Ok(Vec::new()), |keys| kms_keys(keys, raw.kms_region.as_ref()))?,
        encryption_context: raw.encryption_context.map(Spanned::into_inner).unwrap_or_default(),
        stored_as: StoredAs {
            encryption: encryption(raw.sse.as_ref(), raw.sse_kms_key_id.as_ref())?,
            tags: raw.tags.map_or(Ok(BTreeMap::new()), tags)?,
        },
        region: region(raw.region)?,
        s3_region: region(raw.s3_region)?,
        kms_region: region(raw.kms_region)?,
        profile: non_empty(raw.profile, "the name of a profile")?,
        s3_endpoint_url: own(raw.s3_endpoint_url.as_ref())?.or_else(|| endpoint.clone()),
        kms_endpoint_url: own(raw.kms_endpoint_url.as_ref())?.or(endpoint),
        retry_for: raw.retry_for.as_ref().map_or(Ok(AwsKeyConfig::DEFAULT_RETRY_FOR), |text| {
            value::parse_duration(text.get_ref()).ok_or_else(|| {
                wrong(text, format!("`{}` is not a duration; write \"90s\", \"2m\" or \"1h\"", text.get_ref()))
            })
        })?,
    })
}

fn only_for_objects<T>(key: &str, value: Option<&Spanned<T>>) -> Checked<()> {
    match value {
        Some(value) => {
            Err(wrong(value, format!("`{key}` is about the object in S3; with `object = \"token\"` there is none")))
        }
        None => Ok(()),
    }
}

/// Returns how S3 encrypts the object at rest.
fn encryption(sse: Option<&Spanned<String>>, key: Option<&Spanned<String>>) -> Checked<Option<ServerSideEncryption>> {
    let name = key.map(sse_key).transpose()?;
    match (sse.map(|sse| (sse, sse.get_ref().as_str())), key) {
        (Some((_, "aws:kms")), _) => Ok(Some(ServerSideEncryption::Kms(name))),
        (Some((_, "aws:kms:dsse")), _) => Ok(Some(ServerSideEncryption::KmsDsse(name))),
        (Some((_, "AES256")) | None, Some(key)) => {
            Err(wrong(key, "`sse-kms-key-id` needs sse = \"aws:kms\" or sse = \"aws:kms:dsse\"".to_owned()))
        }
        (Some((_, "AES256")), None) => Ok(Some(ServerSideEncryption::Aes256)),
        (Some((sse, other)), _) => Err(wrong(
            sse,
            format!("`{other}` is not an encryption that S3 offers; it offers AES256, aws:kms, aws:kms:dsse"),
        )),
        (None, None) => Ok(None),
    }
}

/// Checks the KMS key with which S3 encrypts. S3 looks an alias up in the account of the caller, and not in the bucket's (S3
/// API Reference, `PutObject`, `x-amz-server-side-encryption-aws-kms-key-id`).
fn sse_key(key: &Spanned<String>) -> Checked<String> {
    let text = key.get_ref();
    let name = KmsArn::parse(text).map_or(text.as_str(), |arn| arn.resource);
    match name {
        "" => Err(wrong(key, "empty: write the key's id or ARN, or leave it out".to_owned())),
        alias if alias.starts_with("alias/") => Err(wrong(
            key,
            format!(
                "`{}` is an alias, which S3 looks up in the caller's account: write the key's id or ARN",
                text.escape_debug()
            ),
        )),
        _ if !text.chars().all(|c| c.is_ascii_alphanumeric() || "-_:/".contains(c)) => {
            Err(wrong(key, format!("`{}` is not a key's id or ARN", text.escape_debug())))
        }
        _ => Ok(text.clone()),
    }
}

/// Checks the object's tags (S3 User Guide, "Categorizing your objects using tags").
fn tags(raw: Spanned<BTreeMap<Spanned<String>, Spanned<String>>>) -> Checked<BTreeMap<String, String>> {
    const MOST: usize = 10;
    if raw.get_ref().len() > MOST {
        return Err(wrong(&raw, format!("{} tags: an object has {MOST} at most", raw.get_ref().len())));
    }
    let check = |text: &Spanned<String>, longest: usize| {
        let allowed = |c: char| c.is_alphanumeric() || " +-=._:/@".contains(c);
        let shown = text.get_ref().escape_debug();
        if text.get_ref().chars().count() > longest {
            return Err(wrong(text, format!("`{shown}` is too long: {longest} characters are possible")));
        }
        if !text.get_ref().chars().all(allowed) {
            let message = format!("`{shown}`: a tag has letters, digits, spaces and + - = . _ : / @ only");
            return Err(wrong(text, message));
        }
        Ok(())
    };
    for (name, value) in raw.get_ref() {
        check(name, 128)?;
        check(value, 256)?;
        if name.get_ref().is_empty() || name.get_ref().starts_with("aws:") {
            return Err(wrong(
                name,
                format!("`{}` cannot be a tag's name: AWS keeps names that start with aws:", name.get_ref()),
            ));
        }
    }
    Ok(raw.into_inner().into_iter().map(|(name, value)| (name.into_inner(), value.into_inner())).collect())
}

/// Returns the KMS keys in the order of the file. `region` is `kms-region`.
fn kms_keys(raw: Spanned<RawKmsKeys>, region: Option<&Spanned<String>>) -> Checked<Vec<String>> {
    let span = raw.span();
    let listed = match raw.into_inner() {
        RawKmsKeys::One(key) => vec![Spanned::new(span, key)],
        RawKmsKeys::List(keys) if (1..=AwsKeyConfig::MAX_KMS_KEYS).contains(&keys.len()) => keys,
        RawKmsKeys::List(keys) => {
            let message = format!("{} KMS keys: 1 to {} are possible", keys.len(), AwsKeyConfig::MAX_KMS_KEYS);
            return Err(Wrong { span, message });
        }
    };
    let is_list = listed.len() > 1;
    let mut keys: Vec<String> = Vec::new();
    for key in listed {
        let text = key.get_ref();
        if text.is_empty() {
            let message = "empty: write a KMS key's id, its ARN, or alias/NAME, or leave it out".to_owned();
            return Err(wrong(&key, message));
        }
        if keys.contains(text) {
            return Err(wrong(&key, format!("`{}` is in the list twice", text.escape_debug())));
        }
        let elsewhere =
            |region: &&Spanned<String>| KmsArn::parse(text).is_some_and(|arn| arn.region != region.get_ref());
        if let Some(region) = region.filter(|_| is_list).filter(elsewhere) {
            let message = format!(
                "`kms-region` would move every key of the list to {}, also {}; leave `kms-region` out: each key is in the \
                 region that its ARN names",
                region.get_ref(),
                text.escape_debug()
            );
            return Err(wrong(region, message));
        }
        keys.push(key.into_inner());
    }
    Ok(keys)
}

fn endpoint(url: &Spanned<String>) -> Checked<String> {
    let text = url.get_ref();
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    if host.is_none_or(|host| host.is_empty() || host.starts_with('/') || host.contains(char::is_whitespace)) {
        return Err(wrong(url, format!("`{text}` is not an endpoint; write https://HOST or http://HOST")));
    }
    Ok(text.clone())
}

fn attach(raw: &RawAttach) -> Checked<AttachConfig> {
    let method = match raw.method.as_ref().map(|method| (method, method.get_ref().as_str())) {
        None | Some((_, "auto")) => Method::Auto,
        Some((_, "nbd")) => Method::Nbd,
        Some((_, "fuse")) => Method::Fuse,
        Some((method, "ublk")) => {
            return Err(wrong(method, "ublk is not supported yet; use auto, nbd or fuse".to_owned()));
        }
        Some((method, other)) => {
            return Err(wrong(method, format!("`{other}` is not an attach method; the methods are auto, nbd, fuse")));
        }
    };
    if let (Method::Fuse, Some(device)) = (method, &raw.device) {
        return Err(wrong(device, "`device` names an NBD device; method = \"fuse\" has none".to_owned()));
    }
    let nbd_device = raw.device.as_ref().map(|device| {
        value::parse_nbd_device(device.get_ref())
            .ok_or_else(|| wrong(device, format!("`{}` is not an NBD device such as /dev/nbd0", device.get_ref())))
    });
    let connections = raw.connections.as_ref().map_or(Ok(AttachConfig::DEFAULT_CONNECTIONS), |connections| {
        u8::try_from(*connections.get_ref())
            .ok()
            .filter(|count| (1..=AttachConfig::MAX_CONNECTIONS).contains(count))
            .ok_or_else(|| {
                let max = AttachConfig::MAX_CONNECTIONS;
                wrong(connections, format!("{} connections: 1 to {max} are possible", connections.get_ref()))
            })
    })?;
    let request_timeout = raw.request_timeout.as_ref().map_or(Ok(None), request_timeout)?;
    Ok(AttachConfig { method, nbd_device: nbd_device.transpose()?, connections, request_timeout })
}

fn request_timeout(text: &Spanned<String>) -> Checked<Option<Duration>> {
    if text.get_ref() == "none" {
        return Ok(None);
    }
    let range = Duration::from_secs(1)..=AttachConfig::LONGEST_REQUEST_TIMEOUT;
    let timeout = value::parse_duration(text.get_ref()).filter(|timeout| range.contains(timeout));
    timeout.map(Some).ok_or_else(|| {
        let longest = AttachConfig::LONGEST_REQUEST_TIMEOUT.as_secs() / 3600;
        wrong(
            text,
            format!(
                "`{}` is not a request timeout; write \"none\", or 1s to {longest}h such as \"5m\"",
                text.get_ref()
            ),
        )
    })
}

fn filesystem(raw: RawFilesystem) -> Checked<FilesystemConfig> {
    let kind = match &raw.kind {
        None => FilesystemConfig::DEFAULT_KIND.to_owned(),
        // The type becomes part of a program's name.
        Some(kind)
            if !kind.get_ref().is_empty()
                && kind.get_ref().chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()) =>
        {
            kind.get_ref().clone()
        }
        Some(kind) => {
            return Err(wrong(kind, format!("`{}` is not a filesystem type such as ext4, xfs, btrfs", kind.get_ref())));
        }
    };
    let mut options = Vec::new();
    for option in raw.options.unwrap_or_default() {
        if option.get_ref().is_empty() || option.get_ref().contains(|c: char| c == ',' || c.is_whitespace()) {
            let message = format!("`{}` is not one mount option; write the options as a list", option.get_ref());
            return Err(wrong(&option, message));
        }
        options.push(option.into_inner());
    }
    let mountpoint = absolute(&raw.mountpoint)?;
    Ok(FilesystemConfig {
        kind,
        binds: binds(&raw.bind.unwrap_or_default(), &mountpoint)?,
        mountpoint,
        options,
        mkfs_options: raw.mkfs_options.unwrap_or_default(),
        protect_mountpoint: raw.protect_mountpoint.unwrap_or(true),
    })
}

/// Checks the folders that are mounted elsewhere as well.
fn binds(raw: &BTreeMap<Spanned<String>, Spanned<String>>, mountpoint: &Path) -> Checked<Vec<BindConfig>> {
    let mut binds: Vec<BindConfig> = Vec::new();
    for (written, target) in raw {
        let (text, folder) = (written.get_ref(), Path::new(written.get_ref()));
        let is_inside = folder.components().all(|part| matches!(part, Component::Normal(_)));
        if text.is_empty() || !is_inside || text.contains('\0') {
            let message = format!(
                "`{}` is not a folder inside the volume; write a path such as \"containerd\", without / at its start and \
                 without `.` and `..`",
                text.escape_debug()
            );
            return Err(wrong(written, message));
        }
        let at: PathBuf = absolute(target)?.components().collect();
        if at.components().any(|part| part == Component::ParentDir) {
            return Err(wrong(target, format!("`{}` contains `..`; write the path without it", target.get_ref())));
        }
        let others = std::iter::once(mountpoint).chain(binds.iter().map(|bind| bind.target.as_path()));
        if let Some(other) = others.into_iter().find(|other| at.starts_with(other) || other.starts_with(&at)) {
            let message = format!(
                "something is to be mounted on {} and on {}, and one of these mounts would hide the other; choose a folder \
                 that is neither in the other one nor above it",
                other.display(),
                at.display()
            );
            return Err(wrong(target, message));
        }
        binds.push(BindConfig { folder: folder.to_owned(), target: at });
    }
    Ok(binds)
}

fn metrics(raw: RawMetrics) -> Checked<MetricsConfig> {
    let listen = raw.listen.get_ref().parse().map_err(|why| wrong(&raw.listen, why))?;
    if let (MetricsAddress::Tcp(_), Some(group)) = (&listen, &raw.group) {
        return Err(wrong(
            group,
            "`group` is for a unix socket; every user of this machine can connect to a port".to_owned(),
        ));
    }
    Ok(MetricsConfig { listen, group: non_empty(raw.group, "the name or number of a group")? })
}

/// Checks that a path is absolute. A relative path would depend on the working directory, which is `/` at boot.
fn absolute(path: &Spanned<String>) -> Checked<PathBuf> {
    let path_ref = Path::new(path.get_ref());
    if !path_ref.is_absolute() || path.get_ref().contains('\0') {
        return Err(wrong(path, format!("`{}` is not an absolute path; start it with /", path.get_ref())));
    }
    Ok(path_ref.to_owned())
}

fn non_empty(text: Option<Spanned<String>>, what: &str) -> Checked<Option<String>> {
    match text {
        Some(text) if text.get_ref().is_empty() => Err(wrong(&text, format!("empty: write {what}, or leave it out"))),
        text => Ok(text.map(Spanned::into_inner)),
    }
}

/// Checks the name of a region, which becomes part of a host name.
fn region(text: Option<Spanned<String>>) -> Checked<Option<String>> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match text {
        Some(text)
            if text.get_ref().is_empty() || text.get_ref().len() > 32 || !text.get_ref().chars().all(allowed) =>
        {
            Err(wrong(&text, format!("`{}` is not a region; write one such as eu-central-1", text.get_ref())))
        }
        text => Ok(text.map(Spanned::into_inner)),
    }
}

fn unused<T>(source: &str, key: &str, value: Option<&Spanned<T>>) -> Checked<()> {
    match value {
        Some(value) => Err(wrong(value, format!("`{key}` has no meaning with source = \"{source}\""))),
        None => Ok(()),
    }
}

fn wrong<T>(at: &Spanned<T>, message: String) -> Wrong {
    Wrong { span: at.span(), message }
}
