//! Plain mode: no header at all. Key, cipher and place are what the user says they are, as with `cryptsetup open --type
//! plain`; nothing tells a wrong key from a right one.
