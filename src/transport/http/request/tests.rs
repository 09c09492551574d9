use super::*;

fn message(id: &str, address: &str, body: &str) -> Outbound {
    Outbound {
        id: id.into(),
        address: address.into(),
        exchange: None,
        headers: crate::event::Headers::new(),
        body: body.to_owned().into(),
    }
}

#[test]
fn an_address_goes_behind_the_path_and_changes_nothing_else() {
    for (base, address, whole) in [
        ("https://h/hooks", "", "https://h/hooks"),
        ("https://h/hooks/", "", "https://h/hooks/"),
        ("https://h", "/a", "https://h/a"),
        ("https://h/hooks", "/a/b", "https://h/hooks/a/b"),
        ("https://h/hooks/", "a", "https://h/hooks/a"),
        ("https://h/hooks?k=v", "/a", "https://h/hooks/a?k=v"),
        ("https://u:p@h:8443/x", "//evil.example/y", "https://u:p@h:8443/x/evil.example/y"),
        ("https://h/x", "/a%2Fb", "https://h/x/a%2Fb"),
        ("https://h/x", "/é", "https://h/x/%C3%A9"),
        ("https://h/x", "/@evil.example", "https://h/x/@evil.example"),
        ("https://h/x", "https://evil.example/", "https://h/x/https://evil.example/"),
    ] {
        let joined = joined(&base.parse().unwrap(), address).unwrap();
        assert_eq!(joined.as_str(), Url::parse(whole).unwrap().as_str(), "{base} {address}");
    }
    for address in
        ["/../x", "/a/../../x", "/..", "/.", "/%2e%2E/x", "/a?b", "/a#b", "/a\\b", "/a b", "/\n"]
    {
        assert!(joined(&"https://h/hooks/x".parse().unwrap(), address).is_err(), "{address:?}");
    }
}

proptest::proptest! {
    #[test]
    fn no_address_leads_elsewhere(address: String) {
        let base: Url = "https://user:password@hooks.example:8443/a/b?k=v".parse().unwrap();
        if let Ok(url) = joined(&base, &address) {
            proptest::prop_assert!(url.as_str().starts_with("https://user:password@hooks.example:8443/a/b"));
            proptest::prop_assert!(url.as_str().ends_with("?k=v"), "{}", url);
        }
    }

    #[test]
    fn an_id_is_a_header_and_its_own(one: String, two: String) {
        for id in [&one, &two] {
            if let Ok(id) = webhook_id(id) {
                proptest::prop_assert!(id.bytes().all(|byte| byte.is_ascii_graphic()));
            }
        }
        // What needed encoding is told from everything else that did.
        let odd = |id: &String| !id.bytes().all(|byte| byte.is_ascii_graphic());
        if one != two && odd(&one) && odd(&two) {
            proptest::prop_assert_ne!(webhook_id(&one), webhook_id(&two));
        }
    }
}

#[test]
fn messages_that_follow_each_other_to_one_address_are_one_request() {
    let messages = [
        message("1", "/a", "{}"),
        message("2", "/a", "{}"),
        message("3", "/b", "{}"),
        message("4", "/a", "{}"),
        message("5", "/a", "{}"),
        message("6", "/a", "{}"),
    ];
    let sizes =
        |batch| groups(&messages, batch).iter().map(|(_, group)| group.len()).collect::<Vec<_>>();
    assert_eq!(sizes(1), [1; 6]);
    assert_eq!(sizes(2), [2, 1, 2, 1]);
    assert_eq!(sizes(1_000), [2, 1, 3]);
    assert!(groups(&messages, 1).iter().all(|(form, _)| *form == Form::Plain));
    assert!(groups(&messages, 2).iter().all(|(form, _)| *form == Form::Array));
    let half = "x".repeat(MAX_ARRAY / 2);
    let large = [
        message("1", "", &half),
        message("2", "", &half),
        message("3", "", &"x".repeat(MAX_ARRAY * 2)),
        message("4", "", "x"),
    ];
    let sizes: Vec<_> = groups(&large, 10).iter().map(|(_, group)| group.len()).collect();
    assert_eq!(sizes, [1, 1, 1, 1]);
}

#[test]
fn an_array_holds_the_bodies_byte_for_byte_and_has_an_id_of_its_own() {
    let mut messages = vec![message("1", "", "{ \"n\":1e400 }"), message("2", "", "[]")];
    assert_eq!(array(&messages), "[{ \"n\":1e400 },[]]");
    assert_eq!(array(&messages[..1]), "[{ \"n\":1e400 }]");
    let id = batch_id(&messages);
    assert_eq!(id, batch_id(&messages));
    assert!(id.starts_with("batch_") && id.len() == 38, "{id}");
    for other in [["12", ""], ["", "12"], ["2", "1"]] {
        let other = other.map(|id| message(id, "", ""));
        assert_ne!(id, batch_id(&other));
    }
    assert_eq!(batch_type(&messages), "application/json");
    messages[0].headers.push("Content-Type", "application/cloudevents+json; charset=utf-8");
    assert_eq!(batch_type(&messages), "application/json");
    messages[1].headers.push(":content_type", "Application/CloudEvents+JSON");
    assert_eq!(batch_type(&messages), "application/cloudevents-batch+json");
}

#[test]
fn an_id_is_percent_encoded_only_where_it_must_be() {
    for (id, header) in [
        ("EDUPULSE:17", "EDUPULSE:17"),
        ("a%20b.c", "a%20b.c"),
        ("a b%", "a%20b%25"),
        ("é\n", "%C3%A9%0A"),
    ] {
        assert_eq!(webhook_id(id).unwrap(), header);
    }
    assert!(webhook_id("").is_err());
}
